"""Real engines that join when there is a place, leave when they are lost, and come back."""

import os
import signal
import threading
import time

import pytest
import ray
from tiny_engines import ENGINES, as_references, assert_same, gathered, generation, process_of

from cluster.additional_engines import AdditionalEngines
from cluster.placement import placed
from cluster.rollout_engines import RolloutEngines
from cluster.settings import load_settings
from item_index.input_error import InputError

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
PATIENCE = 300


@ray.remote
class Occupant:
    """Holds CPUs, and is no engine."""

    def sampler_in_use(self):
        raise ValueError("no model")


def await_engines(tiny, engines, count):
    """Generate until so many engines take part; the calls of the last generation."""
    deadline = time.monotonic() + PATIENCE
    while True:
        calls = generation(tiny, engines)
        engines.wait(calls)
        if len(calls) == count:
            return calls
        assert time.monotonic() < deadline, f"{len(calls)} engines"


def test_an_engine_joins_with_the_latest_weights_leaves_when_it_is_lost_and_comes_back(tiny, ray_cluster, capsys):
    settings = load_settings(None, [*ENGINES, "cluster.rollout_engines=1", "cluster.additional_engines=1"])
    with placed(settings.cluster, engines=1) as placement:
        occupant = Occupant.options(num_cpus=ray.available_resources()["CPU"]).remote()
        engines = RolloutEngines(placement, settings, str(tiny.index_folder), str(tiny.checkpoint), elastic=True)
        try:
            engines.wait_until_started()
            engines.wait(engines.update_weights(as_references(tiny.model, 3)))
            calls = generation(tiny, engines)
            assert len(calls) == 1, "there is no place yet"
            expected = gathered(engines, calls)

            ray.kill(occupant)
            calls = await_engines(tiny, engines, 2)
            assert_same(gathered(engines, calls), expected)
            assert [call.result.weight_version for call in calls] == [3, 3]
            assert "rollout engine 1 has joined: sampler constrained" in capsys.readouterr().out

            process = process_of(engines.engines[1])
            calls = generation(tiny, engines)
            threading.Timer(0.1, os.kill, (process, signal.SIGKILL)).start()
            assert_same(gathered(engines, calls), expected)
            if len(engines.engines) == 2:  # it had answered before the signal came
                assert_same(gathered(engines, generation(tiny, engines)), expected)
            assert [engine.number for engine in engines.engines] == [0]
            assert engines.restarts == 0
            assert "rollout engine 1 has left: it was lost during the rollouts" in capsys.readouterr().out

            calls = await_engines(tiny, engines, 2)
            assert_same(gathered(engines, calls), expected)
            assert process_of(engines.engines[1]) != process
        finally:
            engines.close()


def test_an_engine_that_never_starts_is_given_up_and_its_place_given_back(ray_cluster, capsys):
    cluster = load_settings(None, [*ENGINES, "cluster.additional_engines=1"]).cluster
    tried = []
    additional = AdditionalEngines(
        cluster, lambda number, place: tried.append(number) or Occupant.options(num_cpus=0).remote()
    )
    deadline = time.monotonic() + PATIENCE
    while cluster.rollout_engines in additional:
        assert additional.arrived() == []
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert tried == [cluster.rollout_engines] * (1 + cluster.maximum_restarts)
    assert "stays away, it did not start 2 times in a row" in capsys.readouterr().out


def test_engines_cannot_join_where_weights_need_a_connection():
    with pytest.raises(InputError, match="object_store alone"):
        load_settings(
            None, ["cluster.weight_transfer=nccl", "cluster.gpus_per_engine=1", "cluster.additional_engines=1"]
        )
