from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.machine import describe_machine, write_report
from benchmarks.step import REST, report_rows, report_table, seconds_by_phase


def step_metrics(scale: float) -> dict[str, float]:
    return {
        "seconds/rollouts": 2.0 * scale, "seconds/rewards": 0.5 * scale, "seconds/learner": 1.0 * scale,
        "seconds/weights": 0.25 * scale, "seconds/step": 4.0 * scale, "responses_per_second": 80.0 / scale,
        "groups_trained": 32.0, "tokens_generated": 1000.0,
    }  # fmt: skip


def test_phases_and_the_rest_make_up_the_step() -> None:
    seconds = seconds_by_phase(step_metrics(1.0))
    assert seconds == {"rollouts": 2.0, "rewards": 0.5, "learner": 1.0, "weights": 0.25, REST: 0.25, "step": 4.0}


def test_rows_hold_minimum_median_and_maximum() -> None:
    rows = report_rows("case", [step_metrics(scale) for scale in (3.0, 1.0, 2.0)])
    value = {row["metric"]: (row["value"], row["unit"]) for row in rows}
    assert value["rollouts time, min"] == (2.0, "s")
    assert value["rollouts time, median"] == (4.0, "s")
    assert value["step time, max"] == (12.0, "s")
    assert value["rollout speed, max"] == (500.0, "tokens/s")
    assert value["learner speed, median"] == (16.0, "groups/s")


def test_a_step_that_trains_on_kept_groups_alone_has_no_rollouts() -> None:
    metrics = step_metrics(1.0)
    del metrics["seconds/rollouts"], metrics["seconds/rewards"]
    rows = report_rows("case", [metrics])
    assert {row["metric"]: row["value"] for row in rows}["rollouts time, max"] == 0.0
    assert not any(row["metric"].startswith("rollout speed") for row in rows)


def test_the_table_has_one_line_per_measure() -> None:
    rows = report_rows("case", [step_metrics(1.0), step_metrics(2.0)])
    assert report_table("case", rows).row_count * 3 == len(rows)


def test_the_json_has_the_machine_and_rows_of_one_form(tmp_path: Path) -> None:
    rows = report_rows("case", [step_metrics(1.0)])
    write_report(tmp_path / "step.json", rows)
    report = json.loads((tmp_path / "step.json").read_text())
    assert set(report) == {"machine", "rows"}
    assert report["machine"] == describe_machine()
    assert set(report["machine"]) == {"cpu", "cores", "memory_gib", "python", "torch", "vllm"}
    assert report["rows"] == rows
    for row in report["rows"]:
        assert set(row) == {"case", "subject", "metric", "value", "unit"}
        assert row["subject"] == "ours"
        assert row["value"] == pytest.approx(float(row["value"]))
