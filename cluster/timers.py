"""Seconds by phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """`with timers("rollouts"):` adds to the seconds of that phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds
