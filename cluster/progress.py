"""Progress bars of the stages, and the log lines between them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# A table must not lose digits in a log file, where rich would assume 80 columns.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class Bar:
    """One bar; `advance` takes the values to show beside it."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, **values: float) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.update(self._task, advance=steps, values=shown)  # type: ignore[arg-type]


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Bar]:
    """A bar that shows counts, elapsed and remaining time."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[values]}"), console=console,
    ) as progress:  # fmt: skip
        yield Bar(progress, progress.add_task(name, total=total, values=""))
