"""Places in a real cluster."""

import time

import pytest
import ray

from cluster.bundles import ENGINE, LEARNER
from cluster.placement import placed
from cluster.settings import load_settings


@ray.remote
class Somebody:
    def node(self):
        return ray.get_runtime_context().get_node_id()


def test_a_cluster_that_is_too_small_is_an_error_at_once(ray_cluster):
    cluster = load_settings(None, ["cluster.gpus_per_engine=1", "cluster.rollout_engines=3"]).cluster
    started = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=r"asked for: 1 x learner rank \(1 CPU, 1 GPU\), 3 x rollout .* larger"),
        placed(cluster, engines=3, learner_ranks=1),
    ):
        pass
    assert time.monotonic() - started < 5


def test_reward_workers_without_a_place_are_an_error_at_once(ray_cluster):
    cluster = load_settings(None, ["cluster.reward_cpus=1000"]).cluster
    started = time.monotonic()
    message = r"No node is large enough for a reward worker \(1000 CPUs\): lower .*cluster.reward_cpus"
    with pytest.raises(RuntimeError, match=message), placed(cluster, reward_workers=1):
        pass
    assert time.monotonic() - started < 5


def test_places_that_others_hold_are_an_error_at_the_deadline(ray_cluster):
    cpus = int(ray.cluster_resources()["CPU"])
    all_of_it = [f"cluster.rollout_cpus={cpus}", "cluster.start_seconds=2"]
    cluster = load_settings(None, all_of_it).cluster
    with placed(cluster), pytest.raises(RuntimeError, match=r"within 2 s .*: others hold it"), placed(cluster):
        pass
    with placed(cluster):  # which is free again
        pass


def test_a_colocated_pair_shares_a_bundle(ray_cluster):
    settings = ["cluster.colocated=true", "cluster.learner_cpus=0.5", "cluster.rollout_cpus=0.5"]
    with placed(load_settings(None, settings).cluster, engines=1, learner_ranks=1) as placement:
        options = [placement.options(kind, 0, {}) for kind in (LEARNER, ENGINE)]
        bundles = [one["scheduling_strategy"].placement_group_bundle_index for one in options]
        assert bundles == [0, 0]
        both = [Somebody.options(**one).remote() for one in options]
        nodes = ray.get([actor.node.remote() for actor in both], timeout=60)
        assert nodes[0] == nodes[1]
