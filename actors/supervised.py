"""The supervised stage's rank: Ray Train runs this loop in every worker of its group, with DeepSpeed inside."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from transformers import AutoTokenizer

from curriculum.row_files import RowFile
from learner.engine import LearnerEngine, initialize_process_group
from learner.low_rank import LowRankSettings, add_low_rank_weights
from learner.packed_attention import PACKED
from learner.policy import Policy, add_dropout, load_language_model
from learner.supervised import learnt_tokens, supervised_loss, supervised_step
from learner.training_state import load_training_state, save_training_state

METRICS_FILE = "metrics.jsonl"  # one line per optimizer step


@dataclass(frozen=True)
class SupervisedPlan:
    """What one rank has to do; paths are absolute and on a file system that all ranks share.

    Attributes:
        model: checkpoint to start from.
        folder: of the stage; holds the metrics and, in the end, `checkpoint`.
        passes: row files, one step per row group.
        evaluation: row file of the rows whose loss is measured; None measures none.
        engine: arguments of `LearnerEngine`.
        low_rank: train low-rank weights beside the frozen ones; None trains all.
        known_tokens: rows of the embeddings from here on are new, and trained also beside frozen weights.
        micro_batch_tokens: tokens of one forward pass at most.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        dropout: see `add_dropout`.
        checkpoint_steps, evaluation_steps: steps between two; None is the end of each pass.
        patience: evaluations without a better loss after which training ends, with the best weights; None never.
        seed, threads: of torch.
    """

    model: str
    folder: str
    passes: tuple[str, ...]
    evaluation: str | None
    engine: dict[str, Any]
    low_rank: dict[str, Any] | None
    known_tokens: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    dropout: float
    checkpoint_steps: int | None
    evaluation_steps: int | None
    patience: int | None
    seed: int
    threads: int


@dataclass
class Progress:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    best_loss: float = math.inf
    evaluations_since_best: int = 0


def supervised_rank(arguments: dict[str, Any]) -> None:
    """Train from the start or from the run's latest checkpoint to the end of the plan; rank 0 writes the result."""
    plan = SupervisedPlan(**arguments)
    torch.manual_seed(plan.seed)
    torch.set_num_threads(plan.threads)
    initialize_process_group()
    engine, tokenizer = _engine(plan)
    folder, progress = Path(plan.folder), Progress()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as state:
            progress = Progress(**load_training_state(engine, state))
    if engine.rank == 0:
        _keep_lines(folder / METRICS_FILE, progress.step)
    files = [RowFile(path) for path in plan.passes]
    evaluation = None if plan.evaluation is None else RowFile(plan.evaluation)
    stopped = plan.patience is not None and progress.evaluations_since_best >= plan.patience
    for number, file, step_of_pass in [] if stopped else _steps(files, progress.step):
        _, tokens, learnt = file.step(step_of_pass)
        metrics = supervised_step(engine, tokens, learnt, micro_batch_tokens=plan.micro_batch_tokens)
        progress.step += 1
        end_of_pass = step_of_pass == len(file) - 1
        if evaluation is not None and _due(progress.step, plan.evaluation_steps, end_of_pass):
            metrics["evaluation_loss"] = _evaluate(engine, evaluation, plan.micro_batch_tokens)
            if metrics["evaluation_loss"] < progress.best_loss:
                progress.best_loss, progress.evaluations_since_best = metrics["evaluation_loss"], 0
                if plan.patience is not None:
                    engine.save(folder / "best", tokenizer)
            else:
                progress.evaluations_since_best += 1
        if engine.rank == 0:
            with (folder / METRICS_FILE).open("a") as lines:
                lines.write(json.dumps({"step": progress.step, "pass": number, **metrics}) + "\n")
        stopped = plan.patience is not None and progress.evaluations_since_best >= plan.patience
        last = stopped or progress.step == sum(len(file) for file in files)
        if last or _due(progress.step, plan.checkpoint_steps, end_of_pass):
            with tempfile.TemporaryDirectory() as state:
                save_training_state(engine, state, asdict(progress))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(state))
        if stopped:
            break
    if plan.patience is None:
        engine.save(folder / "checkpoint", tokenizer)
    elif engine.rank == 0 and (folder / "best").is_dir():  # not there where a rank was lost after this move
        (folder / "best").replace(folder / "checkpoint")


def _engine(plan: SupervisedPlan) -> tuple[LearnerEngine, Any]:
    model = load_language_model(plan.model, attention=PACKED)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if plan.dropout:
        add_dropout(model, plan.dropout)
    if plan.low_rank is not None:
        model = add_low_rank_weights(model, LowRankSettings(**plan.low_rank), known_tokens=plan.known_tokens)
    tokenizer = AutoTokenizer.from_pretrained(plan.model, local_files_only=True, trust_remote_code=False)
    return LearnerEngine(Policy(model), **plan.engine), tokenizer


def _steps(files: list[RowFile], done: int) -> Iterator[tuple[int, RowFile, int]]:
    """(pass, its file, step of the pass) of all steps after the first `done`."""
    step = 0
    for number, file in enumerate(files):
        for step_of_pass in range(len(file)):
            if step >= done:
                yield number, file, step_of_pass
            step += 1


def _due(step: int, every: int | None, end_of_pass: bool) -> bool:
    return end_of_pass if every is None else step % every == 0


def _evaluate(engine: LearnerEngine, rows: RowFile, micro_batch_tokens: int) -> float:
    """Mean loss of the learnt tokens of all rows."""
    total, count = 0.0, 0
    for _, tokens, learnt in rows:
        targets = learnt_tokens(learnt)
        total += targets * supervised_loss(engine, tokens, learnt, micro_batch_tokens=micro_batch_tokens)
        count += targets
    return total / count


def _keep_lines(file: Path, steps: int) -> None:
    """Drop the lines of steps that will be done again, by a new file: whoever follows the old one sees the change."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    fresh = file.with_suffix(".new")
    fresh.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps))
    fresh.replace(file)
