"""The live state of a run folder: which command runs, how far its stages are, what MLflow does not have yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.journal import JOURNAL_FILE, SETTINGS_FILE, is_gone, read_records, unsent_records
from cluster.progress import console
from cluster.settings import Settings, load_settings
from cluster.tracking import TRACKING_FOLDER, store_of
from item_index.input_error import InputError

PACE_STEPS = 10  # the latest steps, of which the time left is estimated
SHOWN = (
    "train/reward", "train/direct/reward", "train/reasoning/reward", "train/valid_rate", "train/responses_per_second",
    "train/engine_restarts", "train/learner_restarts", "sft/loss", "sft/tokens_per_second", "sft_continued/loss",
)  # fmt: skip


@dataclass
class StageProgress:
    """What the journal says of a stage's, or a command's, latest run.

    Attributes:
        name: of the run in MLflow.
        session: host, process and its start, of the driver that had it last.
        status: MLflow's, RUNNING as long as there is no other.
        began, latest: time of the first and of the latest record, seconds since 1970.
        steps: (step, time) of its latest metrics, by step.
        values: the latest value of every metric.
    """

    name: str
    session: str
    began: float
    latest: float
    status: str = "RUNNING"
    steps: list[tuple[int, float]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def shown_status(self) -> str:
        """The status, or LOST where the driver has gone without a word; one on another machine cannot be looked at."""
        return "LOST" if self.status == "RUNNING" and is_gone(self.session) else self.status


def progress_of(journal: Path) -> list[StageProgress]:
    """The runs of a journal, each in its latest attempt, in the order in which they were begun last."""
    runs: dict[str, StageProgress] = {}
    for record, _, _ in read_records(journal):
        key, at = record.get("run"), record["time"] / 1000
        if key is None:
            continue
        if record["kind"] == "run":
            earlier = runs.pop(key, None)
            runs[key] = StageProgress(
                record["name"], record["session"], earlier.began if earlier else at, at,
                steps=earlier.steps if earlier else [], values=earlier.values if earlier else {},
            )  # fmt: skip
            continue
        run = runs[key]
        if record["kind"] == "end" and record["of"] == run.session:
            run.status = record["status"]
        elif record["kind"] == "metrics":
            run.values |= record["values"]
            if any(name.startswith(("train/", "sft/", "sft_continued/")) for name in record["values"]):
                run.steps = [*run.steps[-PACE_STEPS:], (record["step"], at)]
        run.latest = at
    return list(runs.values())


def show_status(run_folder: Path) -> None:
    """Print it. Raises InputError where nothing was ever run in the folder."""
    folder = run_folder / TRACKING_FOLDER
    if not (folder / JOURNAL_FILE).is_file():
        raise InputError("there is no run", file=run_folder, remedy="Name the run folder of a gream command.")
    settings = load_settings(folder / SETTINGS_FILE, [f"run_folder={run_folder}"])
    now = time.time()
    for run in progress_of(folder / JOURNAL_FILE):
        status = run.shown_status
        until = now if status == "RUNNING" else run.latest
        console.print(
            f"{run.name}: {status} for {span(until - run.began)}, last word {span(now - run.latest)} ago",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        for line in (*_steps(run, settings), "; ".join(_figures(run))):
            if line:
                console.print(f"    {line}", highlight=False, soft_wrap=True)
    states = sorted((run_folder / "train" / "states").glob("*/step-*/manifest.json"))
    if states:
        console.print(f"newest training state: {states[-1].parent.name}", highlight=False)
    left = unsent_records(folder, store_of(settings))
    console.print(f"tracking: {left} records are not in MLflow yet" if left else "tracking: MLflow has everything")


def _steps(run: StageProgress, settings: Settings) -> Iterator[str]:
    if not run.steps:
        return
    step, at = run.steps[-1]
    if "train/reward" not in run.values:
        yield f"step {step}"
        return
    first_step, first = run.steps[0]
    left = ""
    if step > first_step and run.shown_status == "RUNNING":
        pace = (at - first) / (step - first_step)
        left = f", {pace:.1f} s each, about {span(pace * (settings.train.steps - step))} left"
    yield f"step {step}/{settings.train.steps}{left}"


def _figures(run: StageProgress) -> Iterator[str]:
    for name in SHOWN:
        if name in run.values:
            yield f"{name.partition('/')[2].replace('/', ' ').replace('_', ' ')} {run.values[name]:.4g}"


def span(seconds: float) -> str:
    """A length of time as people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
