"""The supervised stage: direct windows and reasoning rows in curriculum order, on a learner actor."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actors.learner import ENVIRONMENT, LearnerActor
from cluster.placement import await_result, engines_placed, in_bundle, ray_session
from cluster.progress import console, progress_bar
from cluster.settings import Settings
from cluster.tracking import Tracker
from curriculum.corpus import Corpus
from curriculum.rows import Row, direct_windows, in_curriculum_order, reasoning_row
from curriculum.schedule import reasoning_positions
from item_index.ragged import RaggedArray
from learner.policy import build_language_model, fit_vocabulary, load_language_model


def write_initial_checkpoint(settings: Settings, corpus: Corpus, folder: Path) -> None:
    """The model to start from: a Llama from scratch, or the named checkpoint with rows for the new tokens."""
    model_settings = settings.model
    if model_settings.checkpoint is None:
        model = build_language_model(
            corpus.tokenizer, hidden_size=model_settings.hidden_size, layers=model_settings.layers,
            intermediate_size=model_settings.intermediate_size, seed=settings.seed,
        )  # fmt: skip
    else:
        known = AutoTokenizer.from_pretrained(model_settings.checkpoint, local_files_only=True, trust_remote_code=False)
        model = load_language_model(model_settings.checkpoint)
        added = fit_vocabulary(model, corpus.tokenizer, known_tokens=len(known), seed=settings.seed)
        console.print(f"sft: {added} tokens of the index were added to {model_settings.checkpoint}")
    model.save_pretrained(folder, safe_serialization=True)
    corpus.tokenizer.save_pretrained(folder)


def rows_of_pass(corpus: Corpus, reasoning: list[Row], *, number: int, passes: int, seed: int) -> list[Row]:
    """All rows of one pass in order; the last pass is uniform."""
    generator = np.random.default_rng([seed, 3, number])
    direct = list(direct_windows(corpus.sequences, corpus.held_out, corpus.builder, generator=generator))
    direct = [direct[i] for i in generator.permutation(len(direct))]
    shuffled = [reasoning[i] for i in generator.permutation(len(reasoning))]
    places = reasoning_positions(len(direct) + len(shuffled), len(shuffled), uniform=number == passes - 1)
    return in_curriculum_order(direct, shuffled, places)


def run_sft(settings: Settings, corpus: Corpus, folder: Path, tracker: Tracker) -> dict[str, float]:
    """Train; the checkpoint is `folder/checkpoint`."""
    sft = settings.sft
    write_initial_checkpoint(settings, corpus, folder / "initial")
    reasoning = [reasoning_row(example, corpus.held_out, corpus.builder) for example in corpus.reasoning]
    passes = [
        rows_of_pass(corpus, reasoning, number=number, passes=sft.passes, seed=settings.seed)
        for number in range(sft.passes)
    ]
    total_steps = sum(-(-len(rows) // sft.batch_rows) for rows in passes)
    with ray_session(settings.cluster), engines_placed(settings.cluster) as group:
        learner = LearnerActor.options(**in_bundle(group, 0, settings.cluster, ENVIRONMENT)).remote(
            str((folder / "initial").resolve()),
            engine={
                "learning_rate": sft.learning_rate, "weight_decay": sft.weight_decay,
                "warm_up_steps": int(sft.warm_up * total_steps), "total_steps": total_steps, "schedule": "cosine",
                "gradient_clip": sft.gradient_clip, "zero_stage": sft.zero_stage,
            },
            seed=settings.seed, threads=settings.cluster.threads,
        )  # fmt: skip
        step, tokens_seen, started = 0, 0, time.monotonic()
        metrics: dict[str, float] = {}
        with progress_bar("sft", total_steps) as bar:
            for number, rows in enumerate(passes):
                for start in range(0, len(rows), sft.batch_rows):
                    batch = rows[start : start + sft.batch_rows]
                    tokens = RaggedArray.of([row for row, _ in batch], np.int32)
                    learnt = RaggedArray.of([mask for _, mask in batch], bool)
                    metrics = await_result(
                        learner.supervised_step.remote(tokens, learnt, sft.micro_batch_tokens),
                        "the learner's supervised step", settings.cluster.call_seconds,
                    )  # fmt: skip
                    step += 1
                    tokens_seen += len(tokens.values)
                    tracker.metrics(
                        {f"sft/{name}": value for name, value in metrics.items()} | {"sft/pass": number}, step
                    )
                    bar.advance(loss=metrics["loss"])
        await_result(learner.save.remote(str((folder / "checkpoint").resolve())), "saving the checkpoint", 300)
    seconds = time.monotonic() - started
    return {"steps": step, "tokens": tokens_seen, "tokens_per_second": tokens_seen / seconds, "loss": metrics["loss"]}
