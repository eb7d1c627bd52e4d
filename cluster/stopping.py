"""Being asked to stop, by Ctrl-C, SIGTERM or `ray job stop`: at once, or where a step of training ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.progress import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(KeyboardInterrupt):
    """The process was asked to stop by a signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = signal.Signals(number)


def _stop_now(number: int, frame: Any) -> None:
    raise StopRequested(number, f"stopped by {signal.Signals(number).name}")


@contextmanager
def stopping_by_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise StopRequested; in another thread than the main one nothing is changed."""
    with _handlers(dict.fromkeys(SIGNALS, _stop_now)):
        yield


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait for this thread; for processes that are started here, for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stop:
    """Whether the process was asked to stop; `number` is the signal."""

    def __init__(self) -> None:
        self.number: int | None = None


@contextmanager
def finishing_steps(seconds: float) -> Iterator[Stop]:
    """Inside, the first SIGINT or SIGTERM is only taken note of, so that the step can end and its state be written.

    Where that has not happened after `seconds`, or with a second signal, StopRequested is raised in the midst of it.
    """
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        if stop.number is not None:
            _stop_now(number, frame)
        stop.number = number
        signal.setitimer(signal.ITIMER_REAL, seconds)
        name = signal.Signals(number).name
        console.print(f"{name}: the step is finished first, for {seconds:.0f} s at most (cluster.stop_seconds)")

    def abandon(number: int, frame: Any) -> None:
        raise StopRequested(stop.number or number, f"the step did not end within {seconds:.0f} s and is abandoned")

    try:
        with _handlers({**dict.fromkeys(SIGNALS, note), signal.SIGALRM: abandon}):
            yield stop
    finally:
        if stop.number is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python knows handlers there alone
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
