"""What a journal says of the time that a train stage spent in tracking, and whether MLflow has what it should have."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.machine import ReportRow

STEP_SECONDS, TRACKING_SECONDS = "train/seconds/step", "train/seconds/tracking"
LARGEST_SHARE = 0.02

Points = Mapping[tuple[str, str], Counter[tuple[int, str]]]  # (step, value) by run and metric


@dataclass(frozen=True)
class Step:
    """A step of the train stage; `begun` in seconds since the epoch, the others as the run measured them."""

    number: int
    begun: float
    seconds: float
    tracking: float


def steps_of(records: Iterable[dict[str, Any]]) -> list[Step]:
    """The steps in a journal. A step begins where the record of the one before it was written, since that is when the
    seconds were spent that it reports as tracking."""
    steps: list[Step] = []
    begun: float | None = None
    for record in records:
        if record["kind"] == "metrics" and STEP_SECONDS in record["values"]:
            seconds, ended = record["values"][STEP_SECONDS], record["time"] / 1000
            tracking = record["values"][TRACKING_SECONDS]
            steps.append(Step(record["step"], ended - seconds if begun is None else begun, seconds, tracking))
            begun = ended
    return steps


def by_phase(steps: Iterable[Step], moments: Mapping[str, float]) -> dict[str, list[Step]]:
    """The steps that began in each phase, which lasts from its moment to the next one."""
    phases: dict[str, list[Step]] = {phase: [] for phase in moments}
    for step in steps:
        phases[[phase for phase, moment in moments.items() if moment <= step.begun][-1]].append(step)
    return phases


def shares(steps: Sequence[Step]) -> dict[str, float]:
    """Share of the steps' time that was spent in tracking: in all of them together, in the median one, the largest."""
    each = [step.tracking / step.seconds for step in steps]
    together = sum(step.tracking for step in steps) / sum(step.seconds for step in steps)
    return {"together": together, "median": statistics.median(each), "largest": max(each)}


def points_of(records: Iterable[dict[str, Any]]) -> Points:
    """What the metrics in a journal have to be in MLflow."""
    points: dict[tuple[str, str], Counter[tuple[int, str]]] = defaultdict(Counter)
    for record in records:
        if record["kind"] == "metrics":
            for name, value in record["values"].items():
                points[record["run"], name][record["step"], str(value)] += 1
    return points


def problems_of(phases: Mapping[str, Sequence[Step]], expected: Points, found: Points, steps: int) -> list[str]:
    """What is not as it has to be: shares, gaps in the journal, metrics that are not in MLflow exactly once."""
    problems = []
    for phase, members in phases.items():
        if not members:
            problems.append(f"{phase}: no step began, so nothing was measured")
        elif (share := shares(members)["together"]) > LARGEST_SHARE:
            problems.append(f"{phase}: {share:.2%} of step time was spent in tracking, {LARGEST_SHARE:.0%} is allowed")
    numbers = sorted(step.number for members in phases.values() for step in members)
    if numbers != list(range(1, steps + 1)):
        problems.append(f"the journal has {len(numbers)} steps, not each of 1 .. {steps} once")
    for what, some, others in (("not in MLflow", expected, found), ("too much in MLflow", found, expected)):
        left = {key: counts - others.get(key, Counter()) for key, counts in some.items()}
        if count := sum(counts.total() for counts in left.values()):
            (run, name), counts = next((key, counts) for key, counts in left.items() if counts)
            problems.append(f"{count} values are {what}, first {name} of {run} at step {min(counts)[0]}")
    return problems


def report_table(title: str, phases: Mapping[str, Sequence[Step]], caught_up: Mapping[str, float]) -> Table:
    """One line per phase."""
    table = Table(title=title)
    for column in ("", "steps", "step s, median", "tracking by step: together", "median", "largest", "MLflow has all"):
        table.add_column(column, justify="right" if column else "left")
    for phase, steps in phases.items():
        after = f"after {caught_up[phase]:.1f} s" if phase in caught_up else ""
        numbers = [f"{share:.3%}" for share in shares(steps).values()] if steps else [""] * 3
        seconds = f"{statistics.median(step.seconds for step in steps):.2f}" if steps else ""
        table.add_row(phase, str(len(steps)), seconds, *numbers, after)
    return table


def report_rows(phases: Mapping[str, Sequence[Step]], caught_up: Mapping[str, float]) -> list[ReportRow]:
    """The numbers of the table."""
    rows: list[ReportRow] = []
    for phase, steps in phases.items():
        numbers = {"steps": (float(len(steps)), "steps")}
        if steps:
            numbers["step, median"] = (statistics.median(step.seconds for step in steps), "s")
            numbers |= {f"tracking, {name}": (share, "of step time") for name, share in shares(steps).items()}
        if phase in caught_up:
            numbers["until MLflow has all"] = (caught_up[phase], "s")
        rows += [
            {"case": phase, "subject": "ours", "metric": metric, "value": value, "unit": unit}
            for metric, (value, unit) in numbers.items()
        ]
    return rows
