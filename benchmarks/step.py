"""Seconds of one SRPO step by phase.

    python -m benchmarks.step [--config FILE] [--steps N] [--json FILE] [KEY=VALUE]...

It runs the train stage's own loop on the supervised checkpoint of a run folder: one step to warm up, then the measured
ones. Nothing is written into the run folder. `gream sft` (or `gream run`) with the same settings has to come first.

The work of a step, with P = train.prompts_per_step groups of n = train.responses responses:

- rollouts: at least P n responses, under the item constraint; more where groups have no variance and others are drawn.
  A direct response has one token per code and the end of sequence, a reasoning response train.reasoning_budget at most.
- rewards: the constraint is scanned over the same responses once more, and their answers are parsed.
- learner: at most P groups, packed with their prompt: reference and old log-probabilities (no gradient; the old ones
  only with several mini-batches), then forward and backward; each scores every response token of the groups.
- weights: the learner's weights through the object store into the rollout engine.

So the times depend on the checkpoint (how soon it closes its chains, how many groups have variance): compare runs on
the same one. Printed beside them is what a step came to: groups and response tokens generated, groups trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ray
import typer
from rich.table import Table

from benchmarks.machine import ReportRow, write_report
from cluster.pipeline import is_current
from cluster.placement import ray_session
from cluster.progress import console, progress_bar
from cluster.prompts import PromptSource
from cluster.settings import Settings, load_settings
from cluster.srpo_actors import SrpoActors, srpo_actors
from cluster.train import SrpoLoop
from curriculum.corpus import load_corpus
from item_index.input_error import InputError

PHASES = ("rollouts", "rewards", "learner", "weights")
REST = "everything else"


@dataclass(frozen=True)
class RecordingActors(SrpoActors):
    """The loop's actors; keeps the references of all batches of rollouts, so that their tokens can be counted."""

    batches: list[ray.ObjectRef] = field(default_factory=list)

    def generate(self, *arguments: Any, **named: Any) -> ray.ObjectRef:
        batch = super().generate(*arguments, **named)
        self.batches.append(batch)
        return batch


def measure_steps(settings: Settings, steps: int) -> list[dict[str, float]]:
    """The loop's metrics of `steps` steps after one more to warm up; `tokens_generated` is added.

    Raises InputError where the supervised stage has not been run with these settings.
    """
    if not is_current(settings, "sft"):
        raise InputError(
            "there is no supervised checkpoint of these settings", file=settings.folder / "sft",
            remedy="Run `gream sft` (or `gream run`) with the same config and overrides first.",
        )  # fmt: skip
    index_folder = settings.folder / "index"
    source = PromptSource(
        load_corpus(settings.folder / "corpus", index_folder),
        reasoning_budget=settings.train.reasoning_budget, exclude_seen=settings.train.exclude_seen,
    )  # fmt: skip
    measured = []
    with (
        ray_session(settings.cluster),
        srpo_actors(settings, index_folder, settings.folder / "sft" / "checkpoint") as actors,
        progress_bar("benchmark", steps + 1) as bar,
    ):
        recording = RecordingActors(actors.learner, actors.rollout, actors.reward, actors.seconds, actors.chunk_bytes)
        loop = SrpoLoop(settings, source, recording)
        for step in range(steps + 1):
            metrics = loop.step(step)
            tokens = sum(len(ray.get(batch).responses.values) for batch in recording.batches)
            recording.batches.clear()
            bar.advance(seconds=metrics["seconds/step"])
            if step > 0:
                measured.append({**metrics, "tokens_generated": float(tokens)})
    return measured


def seconds_by_phase(metrics: dict[str, float]) -> dict[str, float]:
    """Seconds of the phases of one step, of everything else, and of the whole step."""
    seconds = {phase: metrics.get(f"seconds/{phase}", 0.0) for phase in PHASES}
    whole = metrics["seconds/step"]
    return {**seconds, REST: whole - sum(seconds.values()), "step": whole}


def report_rows(case: str, measured: Sequence[dict[str, float]]) -> list[ReportRow]:
    """Minimum, median and maximum over the measured steps: seconds of each phase, and rates of work."""
    seconds = [seconds_by_phase(metrics) for metrics in measured]
    series: dict[str, tuple[str, list[float]]] = {
        f"{phase} time": ("s", [step[phase] for step in seconds]) for phase in seconds[0]
    }
    series["step speed"] = ("responses/s", [step["responses_per_second"] for step in measured])
    series["rollout speed"] = (
        "tokens/s",
        [step["tokens_generated"] / step["seconds/rollouts"] for step in measured if "seconds/rollouts" in step],
    )
    series["learner speed"] = ("groups/s", [step["groups_trained"] / step["seconds/learner"] for step in measured])
    return [
        {"case": case, "subject": "ours", "metric": f"{name}, {statistic}", "value": function(values), "unit": unit}
        for name, (unit, values) in series.items()
        if values
        for statistic, function in (("min", min), ("median", median), ("max", max))
    ]


def report_table(case: str, rows: Sequence[ReportRow]) -> Table:
    """One line per measure; rows come in threes: minimum, median, maximum."""
    table = Table(title=case)
    table.add_column("")
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    for first in range(0, len(rows), 3):
        three = rows[first : first + 3]
        name = three[0]["metric"].removesuffix(", min")
        table.add_row(name, *(f"{row['value']:.4g}" for row in three), three[0]["unit"])
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    config: Annotated[Path, typer.Option("--config", help="YAML file of settings.")] = Path("configs/ml-100k.yaml"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps, after one to warm up.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Time SRPO steps on the supervised checkpoint of a run folder."""
    settings = load_settings(config, overrides or ())
    measured = measure_steps(settings, steps)
    train = settings.train
    case = (
        f"SRPO step, {settings.folder.name}, {train.prompts_per_step} prompts x {train.responses} responses, "
        f"{settings.cluster.dtype}, {steps} steps"
    )
    rows = report_rows(case, measured)
    console.print(report_table(case, rows))
    means = {
        name: sum(step[name] for step in measured) / steps
        for name in ("groups_generated", "groups_trained", "tokens_generated")
    }
    console.print(
        f"A step generated {means['groups_generated']:.0f} groups with {means['tokens_generated']:.0f} response tokens "
        f"and trained on {means['groups_trained']:.0f} groups (means)."
    )
    if json_file is not None:
        write_report(json_file, rows)


def main() -> None:
    """Entry point: bad input ends with one message and exit status 2."""
    try:
        app()
    except InputError as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
