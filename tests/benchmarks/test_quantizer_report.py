from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.child_process import Outcome, run_child
from benchmarks.machine import write_report
from benchmarks.quantizer import CASES, UNITS, report_rows, report_table
from benchmarks.quantizer_subjects import (
    SUBJECTS,
    Task,
    colliding_items,
    mean_squared_error,
    measure,
    peak_memory_gib,
    synthetic_vectors,
)

NUMBERS = {"time": 2.0, "processor time": 3.0, "peak memory": 0.5, "error": 0.25, "colliding items": 4.0}


def small_task(**changes: object) -> Task:
    fields = {"subject": "ours", "items": 300, "levels": 2, "codes": 8, "rounds": 3, "balanced": False}
    return Task(**{**fields, "items_per_code": None, **changes})  # type: ignore[arg-type]


def test_error_and_collisions_of_hand_made_codes() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 2.0], [5.0, 0.0]], dtype=np.float32)
    books = [np.array([[1.0, 0.0], [5.0, 0.0]], dtype=np.float32), np.array([[0.0, 1.0]], dtype=np.float32)]
    codes = np.array([[0, 0], [0, 0], [1, 0]])
    assert mean_squared_error(vectors, codes, books) == pytest.approx(1.0)
    assert colliding_items(codes) == 2


def test_synthetic_vectors_are_the_same_again_and_of_unit_length() -> None:
    vectors = synthetic_vectors(50, 3)
    np.testing.assert_array_equal(vectors, synthetic_vectors(50, 3))
    assert not np.array_equal(vectors, synthetic_vectors(50, 4))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_measured_subject_has_every_number(balanced: bool) -> None:
    numbers = measure(small_task(balanced=balanced))
    assert list(numbers) == list(UNITS)
    assert 0.0 < numbers["error"] < 1.0  # vectors have unit length
    assert 0.0 < numbers["colliding items"] <= 300.0  # 64 codes for 300 items
    assert numbers["peak memory"] == pytest.approx(peak_memory_gib(), rel=0.5)


def test_every_subject_of_every_case_is_known() -> None:
    assert {subject for case in CASES.values() for subject in case.subjects} == set(SUBJECTS)


def test_a_peer_that_is_not_there_is_named_with_how_to_get_it() -> None:
    outcome = run_child("k-means-constrained", ["false"], 60.0, module="no_such_module", how="pip install it")
    assert outcome.problem == "not installed: pip install it"
    assert report_rows("case", [outcome]) == []


def test_a_subject_that_takes_too_long_is_stopped_and_reported() -> None:
    outcome = run_child("ours", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    (row,) = report_rows("case", [outcome])
    assert (row["subject"], row["metric"], row["value"]) == ("ours", "stopped, unfinished, after", 0.2)


def test_a_subject_that_fails_says_why() -> None:
    outcome = run_child("ours", [sys.executable, "-c", "raise MemoryError('too big')"], 60.0)
    assert outcome.problem == "failed (exit status 1) MemoryError: too big"


def test_rows_and_table_hold_every_subject(tmp_path: Path) -> None:
    outcomes = [Outcome("ours", NUMBERS), Outcome("faiss Kmeans", {}, problem="not installed")]
    rows = report_rows("case", outcomes)
    assert {row["metric"]: (row["value"], row["unit"]) for row in rows} == {
        metric: (NUMBERS[metric], unit) for metric, unit in UNITS.items()
    }
    assert report_table("case", outcomes).row_count == 2
    write_report(tmp_path / "quantizer.json", rows)
    assert json.loads((tmp_path / "quantizer.json").read_text())["rows"] == rows
