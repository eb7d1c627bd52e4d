"""The tracking benchmark: which phase a step belongs to, what tracking took of it, and what MLflow lacks."""

import io
from collections import Counter

import pytest
from rich.console import Console

from benchmarks.tracking_report import by_phase, points_of, problems_of, report_rows, report_table, shares, steps_of

MOMENTS = {"server up": 0.0, "server down": 103.0, "after the wipe": 105.0}


def journal(*, slow=0.01):
    """Six steps of two seconds each, from second 98 on; in the fifth, `slow` seconds were spent in tracking."""
    yield {"kind": "journal", "id": "abc"}
    yield {"kind": "run", "run": "train/f/1"}
    yield {"kind": "metrics", "run": "gream train/f/1", "step": 0, "values": {"load": 5.0}, "time": 99_000}
    for step in range(1, 7):
        values = {"train/seconds/step": 2.0, "train/seconds/tracking": slow if step == 5 else 0.002}
        yield {"kind": "metrics", "run": "train/f/1", "step": step, "values": values, "time": 98_000 + 2000 * step}
        yield {"kind": "metrics", "run": "train/f/1", "step": step, "values": {"validation": float("nan")}}


def phases_of(records):
    return by_phase(steps_of(records), MOMENTS)


def test_a_step_belongs_to_the_phase_in_which_its_tracking_was():
    """Step 4 is recorded after the wipe; what it reports was spent when step 3 was recorded, with the server down."""
    steps = steps_of(journal())
    assert [step.begun for step in steps] == [98, 100, 102, 104, 106, 108]
    assert [[step.number for step in phase] for phase in by_phase(steps, MOMENTS).values()] == [[1, 2, 3], [4], [5, 6]]


def test_the_share_of_a_phase_is_that_of_its_seconds_together():
    found = shares(phases_of(journal(slow=0.5))["after the wipe"])
    assert found["together"] == pytest.approx(0.502 / 4)
    assert found["largest"] == pytest.approx(0.25)
    assert found["median"] == pytest.approx((0.25 + 0.001) / 2)


def test_nothing_is_wrong_where_mlflow_has_every_value_once():
    points = points_of(journal())
    assert points["train/f/1", "validation"] == Counter({(step, "nan"): 1 for step in range(1, 7)})
    assert problems_of(phases_of(journal()), points, points_of(journal()), 6) == []


def test_what_is_wrong_is_named():
    phases, expected, found = phases_of(journal(slow=0.1)), points_of(journal()), points_of(journal())
    del found["gream train/f/1", "load"]
    found["train/f/1", "train/seconds/step"][3, "2.0"] += 1
    found["train/f/1", "validation"][4, "1.0"] = found["train/f/1", "validation"].pop((4, "nan"))
    phases["server down"].clear()
    unmeasured, slow, gap, lacks, surplus = problems_of(phases, expected, found, 6)
    assert slow == "after the wipe: 2.55% of step time was spent in tracking, 2% is allowed"
    assert unmeasured.startswith("server down: no step")
    assert gap == "the journal has 5 steps, not each of 1 .. 6 once"
    assert lacks == "2 values are not in MLflow, first load of gream train/f/1 at step 0"
    assert surplus == "2 values are too much in MLflow, first train/seconds/step of train/f/1 at step 3"


def test_table_and_rows_say_what_each_phase_cost():
    phases = {**phases_of(journal()), "never": []}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_table("a title", phases, {"after the wipe": 7.25}))
    text = console.export_text()
    assert "a title" in text
    assert "0.100%" in text
    assert "after 7.2 s" in text
    rows = {(row["case"], row["metric"]): row["value"] for row in report_rows(phases, {"after the wipe": 7.25})}
    assert rows["server down", "steps"] == 1
    assert rows["after the wipe", "until MLflow has all"] == 7.25
    assert rows["after the wipe", "tracking, largest"] == pytest.approx(0.005)
    assert rows["never", "steps"] == 0
