"""Engines start once for the whole test run: their start costs more than what is tested with them."""

from __future__ import annotations

import os

from actors.rollout import ENVIRONMENT

# Ray starts its workers at niceness 15: on a machine that does something else as well the tests would starve.
os.environ.update({**ENVIRONMENT, "RAY_worker_niceness": "0"})
# Actors import rewards by path from `reward_functions.py`, as users' actors do from their own modules.
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]).rstrip(":")

import hypothesis
import pytest
import ray
from tiny import make_tiny

# Machines are shared: how long one example takes says nothing.
hypothesis.settings.register_profile("gream", deadline=None)
hypothesis.settings.load_profile("gream")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A catalogue of 30 items with index and checkpoint; see `tiny.py`."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def rollout_engine(tiny):
    """A real vLLM engine on the tiny checkpoint. A test that changes its weights puts them back."""
    from actors.rollout import RolloutEngine

    return RolloutEngine(
        str(tiny.checkpoint), str(tiny.index_folder), maximum_tokens=256, sequences=128, kv_cache_mib=64
    )


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray on this machine, with room for a learner and a rollout engine."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def supervised(tmp_path_factory, ray_cluster):
    """A run folder whose supervised stage is done, and the settings; see `train_runs.py`."""
    from train_runs import make_supervised

    return make_supervised(tmp_path_factory.mktemp("supervised"))


@pytest.fixture(scope="session")
def service(supervised):
    """`gream serve` of the supervised run; see `served.py`. Tests that break or replace it start their own."""
    from served import Service

    service = Service(supervised[0])
    yield service
    service.stop()


@pytest.fixture(scope="session")
def demo_service():
    """`gream serve` of what the README's demo has trained in `runs/ml-100k`; without it what asks for it is skipped."""
    from served import Service
    from train_runs import ROOT

    run = ROOT / "runs" / "ml-100k"
    if not (run / "train" / "checkpoint").exists():
        pytest.skip("the README's demo has not been run here (make demo)")
    service = Service(run, "serving.checkpoint=srpo")
    yield service
    service.stop()
