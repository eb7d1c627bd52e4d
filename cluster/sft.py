"""The supervised stage: rows in curriculum order, trained by a worker group of Ray Train with DeepSpeed inside.

`sft_continued` is the same from the supervised checkpoint on, with SRPO's held-out targets among the rows.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import AutoTokenizer

from actors.learner import ENVIRONMENT
from actors.supervised import METRICS_FILE, SupervisedPlan, supervised_rank
from cluster.bundles import bundles_of
from cluster.placement import ray_session, require_places, run_watched
from cluster.progress import Bar, console, progress_bar
from cluster.settings import Settings
from cluster.tracking import Tracker
from curriculum.alignment import TASKS, AlignmentData
from curriculum.corpus import Corpus
from curriculum.row_files import RowFile, write_rows
from curriculum.rows import ReasoningExample
from curriculum.supervised_rows import evaluation_rows, rows_of_pass
from learner.policy import build_language_model, fit_vocabulary, load_language_model

STATES_FOLDER = "states"  # Ray Train's: resumable states, and which of them is the latest


@dataclass(frozen=True)
class Continuation:
    """Supervised training goes on with all train targets, those that were held out for SRPO among them.

    Attributes:
        checkpoint: of the supervised stage.
        steps: optimizer steps.
        learning_rate: at its peak; warm-up and schedule are the supervised stage's.
    """

    checkpoint: Path
    steps: int
    learning_rate: float


def write_initial_checkpoint(settings: Settings, corpus: Corpus, folder: Path) -> None:
    """The model to start from: a Llama from scratch, or the named checkpoint with rows for the new tokens."""
    model_settings = settings.model
    if model_settings.checkpoint is None:
        model = build_language_model(
            corpus.tokenizer, hidden_size=model_settings.hidden_size, layers=model_settings.layers,
            intermediate_size=model_settings.intermediate_size, seed=settings.seed,
        )  # fmt: skip
    else:
        model = load_language_model(model_settings.checkpoint)
        added = fit_vocabulary(model, corpus.tokenizer, known_tokens=known_tokens(settings), seed=settings.seed)
        console.print(f"sft: {added} tokens of the index were added to {model_settings.checkpoint}")
    model.save_pretrained(folder, safe_serialization=True)
    corpus.tokenizer.save_pretrained(folder)


def known_tokens(settings: Settings) -> int:
    """How many tokens the model knew before those of the index were added; 0 for a Llama from scratch."""
    checkpoint = settings.model.checkpoint
    if checkpoint is None:
        return 0
    return len(AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False))


def supervised_plan(
    settings: Settings, corpus: Corpus, folder: Path, continuation: Continuation | None = None
) -> SupervisedPlan:
    """Write the checkpoint to start from and the rows of all passes, and say what a rank has to do with them.

    A continuation takes its steps' rows from passes that are numbered on behind those of the supervised stage, each
    with its reasoning rows spread evenly.
    """
    sft, share = settings.sft, settings.sft.alignment
    data = AlignmentData(
        corpus.catalogue, corpus.sequences,
        corpus.held_out if continuation is None else np.zeros_like(corpus.held_out), corpus.builder, corpus.user_texts,
        maximum_text_tokens=share.maximum_text_tokens, next_item_templates=share.next_item_templates,
    )  # fmt: skip
    if continuation is None:
        model = (folder / "initial").resolve()
        write_initial_checkpoint(settings, corpus, model)
    else:
        model = continuation.checkpoint.resolve()
    passes = write_passes(settings, data, corpus.reasoning, folder / "rows", continuation)
    total_steps = sum(len(RowFile(path)) for path in passes)
    evaluation = None
    if sft.evaluation_rows:
        evaluation = (folder / "rows" / "evaluation.parquet").resolve()
        write_rows(
            evaluation, evaluation_rows(data, users=sft.evaluation_rows, seed=settings.seed),
            rows_per_step=sft.batch_rows,
        )  # fmt: skip
    return SupervisedPlan(
        model=str(model),
        folder=str(folder.resolve()),
        passes=tuple(map(str, passes)),
        evaluation=None if evaluation is None else str(evaluation),
        engine={
            "learning_rate": sft.learning_rate if continuation is None else continuation.learning_rate,
            "weight_decay": sft.weight_decay, "warm_up_steps": int(sft.warm_up * total_steps),
            "total_steps": total_steps, "schedule": "cosine",
            "gradient_clip": sft.gradient_clip, "zero_stage": sft.zero_stage, "dtype": sft.dtype,
        },
        low_rank=None if sft.low_rank is None else sft.low_rank.model_dump(),
        known_tokens=known_tokens(settings),
        micro_batch_tokens=sft.micro_batch_tokens,
        gradient_checkpointing=sft.gradient_checkpointing,
        dropout=sft.dropout,
        checkpoint_steps=sft.checkpoint_steps,
        evaluation_steps=sft.evaluation_steps,
        patience=sft.patience if continuation is None else None,
        seed=settings.seed,
        threads=settings.cluster.threads,
    )  # fmt: skip


def write_passes(
    settings: Settings, data: AlignmentData, reasoning: Sequence[ReasoningExample], folder: Path,
    continuation: Continuation | None,
) -> list[Path]:  # fmt: skip
    """The row file of each pass; those of a continuation hold as many steps as it has, and no more."""
    sft = settings.sft
    tasks = {task.name: getattr(sft.alignment, task.name) for task in TASKS}
    files: list[Path] = []
    left = None if continuation is None else continuation.steps
    for number in range(sft.passes) if continuation is None else itertools.count(sft.passes):
        last = continuation is not None or number == sft.passes - 1
        rows = rows_of_pass(
            data, reasoning, tasks, number=number, uniform=last or sft.curriculum == "uniform",
            dense=sft.supervision == "dense", seed=settings.seed,
        )  # fmt: skip
        files.append((folder / f"pass_{number}.parquet").resolve())
        write_rows(
            files[-1], rows if left is None else itertools.islice(rows, left * sft.batch_rows),
            rows_per_step=sft.batch_rows,
        )  # fmt: skip
        if left is not None:
            left -= len(RowFile(files[-1]))
            if not left:
                break
    return files


def run_sft(
    settings: Settings, corpus: Corpus, folder: Path, tracker: Tracker, *, name: str,
    continuation: Continuation | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train; the checkpoint is `folder/checkpoint`.

    Args:
        name: of everything that the result depends on. States of another name are removed; from those of this name an
            interrupted stage goes on where its latest state was written.
    """
    states = folder / STATES_FOLDER
    for other in states.iterdir() if states.is_dir() else ():
        if other.name != name:
            shutil.rmtree(other)
    if not (states / name).is_dir():
        (folder / METRICS_FILE).unlink(missing_ok=True)
        if (folder / "checkpoint").is_dir():
            shutil.rmtree(folder / "checkpoint")
    plan = supervised_plan(settings, corpus, folder, continuation)
    stage = "sft" if continuation is None else "sft_continued"
    with ray_session(settings.cluster):
        metrics, tokens_per_second = _train(settings, plan, tracker, states, name, stage)
    shutil.rmtree(states)  # of use to an interrupted stage only, and several times as large as the model
    evaluated = [line["evaluation_loss"] for line in metrics if "evaluation_loss" in line]
    return {
        "steps": len(metrics), "tokens": int(sum(line["tokens"] for line in metrics)),
        "tokens_per_second": tokens_per_second,
        "loss": metrics[-1]["loss"], **({"evaluation_loss": evaluated[-1]} if evaluated else {}),
    }  # fmt: skip


def _train(
    settings: Settings, plan: SupervisedPlan, tracker: Tracker, states: Path, name: str, stage: str
) -> tuple[list[dict[str, float]], float]:
    """Run the worker group to the end; returns the metrics of every step, and tokens per second of those done here."""
    sft, cluster = settings.sft, settings.cluster
    ranks = bundles_of(cluster, engines=0, learner_ranks=sft.ranks)
    require_places(ranks, cluster)
    worker = ranks[0].resources
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(
        cluster.wait_for_nodes_seconds + cluster.start_seconds
    )  # Ray Train's only way to say it
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(cluster.threads)}
    trainer = TorchTrainer(
        supervised_rank,
        train_loop_config=asdict(plan),
        torch_config=TorchConfig(backend="nccl" if "GPU" in worker else "gloo", timeout_s=int(cluster.call_seconds)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=sft.ranks, use_gpu="GPU" in worker, resources_per_worker=worker, placement_strategy="PACK"
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # the checker sees the class of the former version
            name=name, storage_path=str(states.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=sft.maximum_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=sft.kept_states),
            worker_runtime_env={"env_vars": environment},
        ),
    )  # fmt: skip
    metrics = MetricsLines(Path(plan.folder) / METRICS_FILE, stage)
    metrics.read()
    done_before = len(metrics.lines)
    started = time.monotonic()
    with progress_bar(stage, plan.engine["total_steps"]) as bar:
        run_watched(stage, trainer.fit, lambda: metrics.show(tracker, bar), cluster.call_seconds)
    tokens = sum(line["tokens"] for line in metrics.lines[done_before:])
    return metrics.lines, tokens / (time.monotonic() - started)


class MetricsLines:
    """The lines of the file to which rank 0 appends one per step; a restarted rank cuts it back to its state first."""

    def __init__(self, file: Path, stage: str = "sft") -> None:
        self._file, self._stage, self._node, self._read, self._shown = file, stage, 0, 0, 0
        self.lines: list[dict[str, float]] = []

    def read(self) -> bool:
        """Take in what was written since; returns whether anything was."""
        if not self._file.is_file():
            return False
        with self._file.open("rb") as content:
            node = os.fstat(content.fileno()).st_ino
            if node != self._node:  # cut back: put in the place of the former file as a whole
                self.lines, self._read, self._node = [], 0, node
            content.seek(self._read)
            whole = content.read().rpartition(b"\n")[0]
        if not whole:
            return False
        self._read += len(whole) + 1
        self.lines += [json.loads(line) for line in whole.splitlines()]
        return True

    def show(self, tracker: Tracker, bar: Bar) -> bool:
        """Read, and hand steps that were not seen before to the tracker and the bar."""
        changed = self.read()
        for line in self.lines[self._shown :]:
            tracker.metrics(
                {f"{self._stage}/{key}": value for key, value in line.items() if key != "step"}, int(line["step"])
            )
        if len(self.lines) > self._shown:
            bar.advance(len(self.lines) - self._shown, loss=self.lines[-1]["loss"])
            self._shown = len(self.lines)
        return changed
