"""Residual k-means against faiss and k-means-constrained: time, error, collisions, memory.

    python -m benchmarks.quantizer [--items N]... [--case NAME]... [--limit SECONDS] [--json FILE]

The vectors are synthetic, 384 dimensions (see `benchmarks.quantizer_subjects`). Cases, levels of 256 codes each:

- one-level: balanced, one level, 10 rounds, from the same start; against k-means-constrained.
- balanced: balanced, four levels, 25 rounds; against k-means-constrained level by level.
- plain: four levels, 25 rounds, trained on 256 items a code (the default here and in faiss); against faiss.Kmeans level
  by level and faiss.ResidualQuantizer.
- plain-all: the same, trained on all items; against faiss.Kmeans.

Every subject runs in a process of its own with the threads that its library takes by default (OMP_NUM_THREADS bounds
them). Time is that of fitting and of giving every item its codes; peak memory is the whole process's, the vectors and
libraries included; error is the mean squared norm that all levels leave. What takes longer than the limit, vectors and
imports included, is stopped and said to have. Peers that are not installed are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.child_process import Outcome, run_child
from benchmarks.machine import ReportRow, write_report
from benchmarks.quantizer_subjects import Task, command

CODES = 256
UNITS = {"time": "s", "processor time": "s", "peak memory": "GiB", "error": "squared norm", "colliding items": "items"}
FAISS = {"module": "faiss", "how": "pip install faiss-cpu"}
NEEDS = {
    "faiss Kmeans": FAISS,
    "faiss ResidualQuantizer": FAISS,
    "k-means-constrained": {"module": "k_means_constrained", "how": "pip install k-means-constrained"},
}


class CaseName(StrEnum):
    ONE_LEVEL = "one-level"
    BALANCED = "balanced"
    PLAIN = "plain"
    PLAIN_ALL = "plain-all"


@dataclass(frozen=True)
class Case:
    """What all subjects of a case have in common."""

    subjects: tuple[str, ...]
    levels: int
    rounds: int
    balanced: bool
    items_per_code: int | None

    def task(self, subject: str, items: int) -> Task:
        return Task(subject, items, self.levels, CODES, self.rounds, self.balanced, self.items_per_code)

    def title(self, items: int) -> str:
        kind = "balanced" if self.balanced else "plain"
        part = "all items" if self.items_per_code is None else f"{self.items_per_code} items a code"
        return f"{kind}, {items} x 384, {self.levels} x {CODES} codes, {self.rounds} rounds, trained on {part}"


CASES = {
    CaseName.ONE_LEVEL: Case(("ours", "k-means-constrained"), 1, 10, True, None),
    CaseName.BALANCED: Case(("ours", "k-means-constrained"), 4, 25, True, 256),
    CaseName.PLAIN: Case(("ours", "faiss Kmeans", "faiss ResidualQuantizer"), 4, 25, False, 256),
    CaseName.PLAIN_ALL: Case(("ours", "faiss Kmeans"), 4, 25, False, None),
}


def report_rows(title: str, outcomes: Sequence[Outcome]) -> list[ReportRow]:
    """One row per number; a subject that was stopped has one row that says so; one that did not run has none."""
    rows: list[ReportRow] = []
    for outcome in outcomes:
        numbers = [(metric, value, UNITS[metric]) for metric, value in outcome.numbers.items()]
        if outcome.stopped_after is not None:
            numbers.append(("stopped, unfinished, after", outcome.stopped_after, "s"))
        rows += [
            {"case": title, "subject": outcome.subject, "metric": metric, "value": value, "unit": unit}
            for metric, value, unit in numbers
        ]
    return rows


def report_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """One line per subject."""
    table = Table(title=title)
    table.add_column("")
    for metric, unit in UNITS.items():
        table.add_column(metric if unit == metric.split()[-1] else f"{metric} ({unit})", justify="right")
    table.add_column("")
    for outcome in outcomes:
        cells = [f"{outcome.numbers[metric]:.5g}" if metric in outcome.numbers else "-" for metric in UNITS]
        table.add_row(outcome.subject, *cells, outcome.problem)
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    items: Annotated[
        list[int] | None, typer.Option(min=CODES, help="Items; 10000, 100000 and 1000000 if none.")
    ] = None,
    case: Annotated[list[CaseName] | None, typer.Option(help="Cases to run; all if none.")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one subject may take.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare residual k-means with its peers on synthetic vectors."""
    console = Console()
    rows: list[ReportRow] = []
    for count in items or (10_000, 100_000, 1_000_000):
        for name in case or list(CaseName):
            wanted = CASES[name]
            outcomes = [
                run_child(subject, command(wanted.task(subject, count)), limit, **NEEDS.get(subject, {}))
                for subject in wanted.subjects
            ]
            console.print(report_table(wanted.title(count), outcomes))
            rows += report_rows(wanted.title(count), outcomes)
            if json_file is not None:
                write_report(json_file, rows)  # after every case: the large ones take long


if __name__ == "__main__":
    app()
