"""The stages of a run in their order: what each reads, and whether what it wrote can be used again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from cluster.index import STAGE_FILE, VECTORS_FILE, index_stage, read_data
from cluster.index_growth import update_index_stage
from cluster.progress import console
from cluster.settings import Settings
from cluster.teaching import language_model_teacher, show_teacher
from cluster.tracking import CommandTracking, Tracker, tracked_command
from curriculum.corpus import build_corpus, load_corpus
from curriculum.tokenizer import saved_tokenizer
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens
from item_index.vectors import vectors_of


def corpus_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    """Split, rows, tokenizer."""
    catalogue, sequences = read_data(settings)
    corpus = settings.corpus
    teacher = language_model_teacher(settings, folder)
    summary = build_corpus(
        folder, catalogue=catalogue, sequences=sequences, index=SemanticIdIndex.load(settings.folder / "index"),
        item_vectors_ID=vectors_of(settings.folder / "index" / VECTORS_FILE, catalogue.item_ids),
        checkpoint=settings.model.checkpoint, history_items=corpus.history_items,
        minimum_history=corpus.minimum_history, removed_share=corpus.removed_share,
        rewritten_history_items=corpus.rewritten_history_items,
        maximum_think_characters=corpus.maximum_think_characters,
        minimum_think_tokens=settings.train.minimum_think_tokens,
        reasoning_rows=corpus.reasoning_rows, rl_holdout=corpus.rl_holdout, text_vocabulary=corpus.text_vocabulary,
        seed=settings.seed, teacher=teacher,
    )  # fmt: skip
    if teacher is not None:
        show_teacher(summary["teacher"], folder, tracker)
    console.print(
        f"corpus: {summary['users']} users, {summary['items']} items, {summary['interactions']} interactions; "
        f"{summary['reasoning_rows']} reasoning rows (rejected: {sum(summary['rejected_traces'].values())}, "
        f"rewriting removes {summary['removed_share']:.0%} of the history), {summary['held_out_targets']} targets held "
        f"out for RL; split {summary['split_fingerprint'][:12]}"
    )
    for reason, count in summary["rejected_traces"].items():
        console.print(f"corpus: {count} traces rejected: {reason} (see {folder / 'rejected.parquet'})", markup=False)
    if chains := summary["chains"]:
        console.print(
            f"corpus: chains of {chains['think_tokens']:.0f} think tokens (10 % below {chains['think_tokens_10']:.0f}, "
            f"10 % above {chains['think_tokens_90']:.0f}), rewritten histories of {chains['rewritten_items']:.1f} items"
        )
        tracker.metrics({f"chains/{name}": value for name, value in chains.items()})
    return summary


def sft_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    from cluster.sft import run_sft  # Ray, DeepSpeed and vLLM are imported by the stages that use them

    corpus = load_corpus(settings.folder / "corpus", settings.folder / "index")
    summary = run_sft(settings, corpus, folder, tracker, name=fingerprint(settings, "sft")[:16])
    console.print(
        f"sft: {summary['steps']} steps, {summary['tokens_per_second']:.0f} tokens/s, loss {summary['loss']:.3f}"
    )
    tracker.model(folder / "checkpoint", "sft", ["sft"])
    return summary


def sft_continued_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    """What the time of SRPO and its targets are worth to supervised training, from the same checkpoint."""
    from cluster.sft import Continuation, run_sft

    corpus = load_corpus(settings.folder / "corpus", settings.folder / "index")
    checkpoint = _checkpoint_with_tokens(settings.folder / "sft" / "checkpoint", corpus.index)
    steps = settings.sft_continued.steps
    if steps is None:
        trained, supervised = (
            json.loads((settings.folder / STAGES[name].folder / STAGE_FILE).read_text()) for name in ("train", "sft")
        )
        steps = equal_time_steps(trained, supervised)
        console.print(f"sft_continued: {steps} steps, as many as take the train stage's {trained['seconds']:.0f} s")
    continuation = Continuation(checkpoint, steps, settings.sft_continued.learning_rate or settings.sft.learning_rate)
    summary = run_sft(
        settings, corpus, folder, tracker, name=fingerprint(settings, "sft_continued")[:16], continuation=continuation
    )
    console.print(f"sft_continued: {summary['steps']} steps, loss {summary['loss']:.3f}")
    tracker.model(folder / "checkpoint", "sft_continued", ["sft_continued"])
    return summary


def equal_time_steps(trained: dict[str, Any], supervised: dict[str, Any]) -> int:
    """Supervised steps that take as long as the train stage took, by the records of both stages."""
    summary = supervised["summary"]
    steps_per_second = summary["tokens_per_second"] * summary["steps"] / summary["tokens"]
    return max(1, round(trained["seconds"] * steps_per_second))


def train_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    from cluster.train_stage import run_train

    corpus = load_corpus(settings.folder / "corpus", settings.folder / "index")
    checkpoint = _checkpoint_with_tokens(settings.folder / "sft" / "checkpoint", corpus.index)
    report = run_train(
        settings, corpus, settings.folder / "index", checkpoint, folder, tracker,
        name=fingerprint(settings, "train")[:16],
    )  # fmt: skip
    tracker.model(folder / "checkpoint", "srpo", ["srpo"])
    if (folder / "best").is_dir():
        tracker.model(folder / "best", "best", ["best"])
    return report


def evaluate_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    from cluster.evaluate import run_evaluate

    corpus = load_corpus(settings.folder / "corpus", settings.folder / "index")
    checkpoints: dict[str, Path] = {
        name: _checkpoint_with_tokens(settings.folder / stage / "checkpoint", corpus.index)
        for name, stage in EVALUATED_STAGES.items()
        if name in settings.evaluation.checkpoints
    }
    return run_evaluate(settings, corpus, settings.folder / "index", checkpoints, folder, tracker)


def _checkpoint_with_tokens(checkpoint: Path, index: SemanticIdIndex) -> Path:
    """The folder, after a look whether its tokenizer has the index's tokens: engines start only after that."""
    if not checkpoint.is_dir():
        raise InputError("there is no checkpoint", file=checkpoint, remedy="Run the stage that writes it.")
    SemanticIdTokens.of(saved_tokenizer(checkpoint), index)
    return checkpoint


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the settings that it depends on, and the stages whose output it reads (`inputs_of`)."""

    run: Callable[[Settings, Path, Tracker], dict[str, Any]]
    sections: tuple[str, ...]
    after: tuple[str, ...]
    folder: str


STAGES = {
    "index": Stage(index_stage, ("data", "index"), (), "index"),
    "corpus": Stage(
        corpus_stage, ("data", "corpus", "model.checkpoint", "train.minimum_think_tokens"), ("index",), "corpus"
    ),
    "sft": Stage(sft_stage, ("sft", "model"), ("corpus",), "sft"),
    "train": Stage(train_stage, ("train", "cluster.dtype"), ("sft",), "train"),
    "sft_continued": Stage(sft_continued_stage, ("sft", "model", "sft_continued"), ("train",), "sft_continued"),
    "evaluate": Stage(evaluate_stage, ("evaluation", "cluster.dtype", "train.reasoning_budget"), (), "evaluation"),
}


EVALUATED_STAGES = {"sft": "sft", "sft_continued": "sft_continued", "srpo": "train"}  # by name of the checkpoint


def stages_of(settings: Settings) -> list[str]:
    """The stages of a run, in order: those that the evaluated checkpoints need."""
    needed = {"evaluate"}
    for name in reversed(STAGES):
        if name in needed:
            needed.update(inputs_of(settings, name))
    return [name for name in STAGES if name in needed]


def inputs_of(settings: Settings, name: str) -> tuple[str, ...]:
    """The stages whose output a stage reads."""
    if name == "evaluate":
        return tuple(EVALUATED_STAGES[checkpoint] for checkpoint in settings.evaluation.checkpoints)
    return STAGES[name].after


@cache
def code_fingerprint() -> str:
    """Hash of the source files of all packages: after a change of the code every stage runs again."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package in ("actors", "learner", "rewards", "item_index", "cluster", "curriculum", "evaluation"):
        for file in sorted((root / package).glob("*.py")):
            digest.update(f"{package}/{file.name}".encode() + file.read_bytes())
    return digest.hexdigest()


def file_hash(file: str) -> str:
    """SHA-256 of a file, read once as long as it does not change."""
    stat = Path(file).stat()
    return _file_hash(file, stat.st_size, stat.st_mtime_ns)


@cache
def _file_hash(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def stage_inputs(settings: Settings, name: str) -> dict[str, str]:
    """Everything that a stage's output depends on, each as a hash: the code, the seed, its settings by section, data
    files, and the stages before it."""
    stage = STAGES[name]
    values: dict[str, Any] = {"code": code_fingerprint(), "seed": settings.seed}
    for section in stage.sections:
        value: Any = settings
        for part in section.split("."):
            value = getattr(value, part)
        values[section] = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    if "data" in stage.sections:
        for kind in ("items", "interactions"):
            file = values["data"].pop(kind)  # where it lies does not count
            if not Path(file).is_file():
                raise InputError(
                    "the file does not exist", file=file, remedy="Name it in data.items or data.interactions."
                )
            values[f"data.{kind}"] = file_hash(file)
    for earlier in inputs_of(settings, name):
        values[f"the {earlier} stage"] = fingerprint(settings, earlier)
    return {
        part: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for part, value in values.items()
    }


def fingerprint(settings: Settings, name: str) -> str:
    """Hash of everything a stage's output depends on."""
    return hashlib.sha256(json.dumps(stage_inputs(settings, name), sort_keys=True).encode()).hexdigest()


def changed_inputs(settings: Settings, name: str) -> list[str] | None:
    """What has changed since the stage's folder was finished; None where it never was."""
    marker = settings.folder / STAGES[name].folder / STAGE_FILE
    if not marker.is_file():
        return None
    before, now = json.loads(marker.read_text()).get("inputs", {}), stage_inputs(settings, name)
    return sorted(part for part in before.keys() | now.keys() if before.get(part) != now.get(part))


def is_current(settings: Settings, name: str) -> bool:
    """Whether the stage's folder was finished with the same inputs."""
    return changed_inputs(settings, name) == []


def _require_current(settings: Settings, names: tuple[str, ...]) -> None:
    for name in names:
        changed = changed_inputs(settings, name)
        if changed != []:
            raise InputError(
                f"the {name} stage is missing" if changed is None
                else f"the {name} stage was made with something else: {', '.join(changed)} changed since",
                file=settings.folder,
                remedy=f"Run `gream {name}` with the same config, or `gream run` for all stages.",
            )  # fmt: skip


def replay_rollouts(settings: Settings, path: Path) -> None:
    """Train the supervised checkpoint on groups that a run kept; writes `replay/` in the run folder."""
    from cluster.replay import rollout_files, run_replay

    files = rollout_files(path)
    _require_current(settings, ("sft",))
    checkpoint = settings.folder / "sft" / "checkpoint"
    with (
        tracked_command(settings, "train --replay", code_fingerprint()) as command,
        command.stage("replay", hashlib.sha256(" ".join(map(str, files)).encode()).hexdigest()) as tracker,
    ):
        run_replay(settings, settings.folder / "index", checkpoint, files, settings.folder / "replay", tracker)


def run_stages(settings: Settings, names: list[str], *, update_index: bool = False) -> None:
    """Run stages in order, each only where its inputs have changed; earlier stages must be there and current.

    With `update_index` an index that is not current is grown to the new catalogue instead of made anew.
    """
    _require_current(settings, inputs_of(settings, names[0]))
    transformers_logging.disable_progress_bar()  # a stage shows its own
    settings.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as open_runs:
        command: CommandTracking | None = None  # a command that re-uses everything is no run
        for name in names:
            changed = changed_inputs(settings, name)
            if changed == []:
                console.print(f"{name}: unchanged, re-used ({settings.folder / STAGES[name].folder})")
                continue
            if changed:
                console.print(f"{name}: made again, for {', '.join(changed)} changed", highlight=False)
            if command is None:
                title = names[0] if len(names) == 1 else "run"
                command = open_runs.enter_context(tracked_command(settings, title, code_fingerprint()))
            _run_stage(settings, name, command, update_index=update_index)


def _run_stage(settings: Settings, name: str, command: CommandTracking, *, update_index: bool) -> None:
    console.rule(name)
    inputs, wanted = stage_inputs(settings, name), fingerprint(settings, name)
    started = time.monotonic()
    folder = settings.folder / STAGES[name].folder
    folder.mkdir(parents=True, exist_ok=True)
    run = STAGES[name].run
    if update_index and name == "index":
        run = update_index_stage  # it takes the marker away when it begins to write
    else:
        (folder / STAGE_FILE).unlink(missing_ok=True)
    (settings.folder / "settings.yaml").write_text(settings.dump())
    with command.stage(name, wanted) as tracker:
        summary = run(settings, folder, tracker)
        track_inputs(settings, name, tracker)
        seconds = time.monotonic() - started
        tracker.metrics({"seconds": seconds})
    marker = {"inputs": inputs, "seconds": seconds, "summary": summary}
    (folder / STAGE_FILE).write_text(json.dumps(marker, indent=2))
    console.print(f"{name}: done in {seconds:.0f} s")


def track_inputs(settings: Settings, name: str, tracker: Tracker) -> None:
    """The hashes of data and index as tags; after the index stage also how many items each code has."""
    index = SemanticIdIndex.load(settings.folder / "index")
    hashes = {
        f"gream.data.{kind}": file_hash(path)
        for kind, path in (("items", settings.data.items), ("interactions", settings.data.interactions))
    }
    tracker.tags({**hashes, "gream.index": index.version})
    if name == "index":
        for level in range(index.levels):
            used = np.sort(np.bincount(index.codes_IL[:, level], minlength=index.level_sizes[level]))[::-1]
            for rank, items in enumerate(used.tolist()):
                tracker.metrics({f"index/code_usage/level_{level + 1}": items}, rank)
