"""The benchmark of faults: when they come, and which metrics of two runs count as the same."""

import io

import numpy as np
import pytest
import typer
from rich.console import Console

from benchmarks.faults import different_metrics, moments, recovery_table


def test_every_fault_has_a_part_of_the_run_of_its_own_and_the_seed_fixes_its_moment():
    times = moments(20, 30, np.random.default_rng(0))
    assert len(times) == 20
    parts = (times - 1) / (27 / 20)
    assert np.floor(parts).tolist() == list(range(20))
    assert len(np.unique(parts % 1)) == 20, "not at the same moment of each part"
    assert times.tolist() == moments(20, 30, np.random.default_rng(0)).tolist()
    assert times.tolist() != moments(20, 30, np.random.default_rng(1)).tolist()


def test_more_faults_than_the_steps_have_room_for_are_refused():
    with pytest.raises(typer.BadParameter, match="20 faults need 29 steps, the config has 28"):
        moments(20, 28, np.random.default_rng(0))


def test_metrics_are_compared_but_for_those_of_time():
    one = {"train/reward": 0.5, "train/tokens": 2000.0, "train/seconds/step": 3.0, "train/responses_per_second": 9.0}
    alike = {"train/reward": 0.5009, "train/tokens": 2001.0, "train/seconds/step": 9.0}
    assert different_metrics(one, alike) == {}
    assert different_metrics(one, one | {"train/reward": 0.5011}).keys() == {"train/reward"}
    assert different_metrics(one, one | {"train/tokens": 2003.0}).keys() == {"train/tokens"}
    assert different_metrics(one, one | {"train/reward": float("nan")}).keys() == {"train/reward"}
    assert different_metrics(one, {"train/tokens": 2000.0}) == {"train/reward": np.inf}


def test_the_table_has_the_median_of_each_kind_that_occurred():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(recovery_table({"node": [30.0, 10.0, 23.0], "learner rank": []}, "3 faults", 2.0))
    text = console.export_text()
    assert "23.0" in text
    assert "learner rank" not in text
