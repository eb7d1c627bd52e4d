"""One subject of a benchmark in a process of its own, so that its time, threads and peak memory are its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Outcome:
    """What became of one subject: its numbers, or why there are none."""

    subject: str
    numbers: dict[str, float]
    stopped_after: float | None = None
    problem: str = ""


def run_child(subject: str, command: list[str], limit: float, *, module: str = "numpy", how: str = "") -> Outcome:
    """Run a command whose last line of output is the JSON object of its numbers, for `limit` seconds at most.

    `module` is what the subject needs, and `how` the command that installs it.
    """
    if find_spec(module) is None:
        return Outcome(subject, {}, problem=f"not installed: {how}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Outcome(subject, {}, stopped_after=limit, problem=f"stopped after {limit:.0f} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Outcome(subject, {}, problem=f"failed (exit status {done.returncode}) {last}")
    return Outcome(subject, json.loads(done.stdout.splitlines()[-1]))
