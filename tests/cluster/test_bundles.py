"""Bundles of a run, and whether a cluster has a place for them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bundles import ENGINE, LEARNER, REWARD, Bundle, Process, bundles_of, nodes_for, what_is_missing
from cluster.settings import load_settings
from item_index.input_error import InputError


def bundles(*overrides, engines=2, ranks=2, rewards=0):
    cluster = load_settings(None, list(overrides)).cluster
    return bundles_of(cluster, engines=engines, learner_ranks=ranks, reward_workers=rewards)


def shape(found):
    return [[(process.kind, process.number, process.gpus) for process in bundle.processes] for bundle in found]


def test_every_process_has_a_bundle_of_its_own_or_colocated_ones_share_a_gpu():
    apart = bundles("cluster.gpus_per_engine=1", "cluster.tensor_parallel=2", engines=1)
    assert shape(apart) == [[(LEARNER, 0, 1)], [(LEARNER, 1, 1)], [(ENGINE, 0, 2)]]
    assert [bundle.resources for bundle in apart] == [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 2}]
    together = bundles("cluster.gpus_per_engine=1", "cluster.colocated=true", "cluster.learner_cpus=3", ranks=3)
    assert shape(together) == [
        [(LEARNER, 0, 0.5), (ENGINE, 0, 0.5)], [(LEARNER, 1, 0.5), (ENGINE, 1, 0.5)], [(LEARNER, 2, 1)],
    ]  # fmt: skip
    assert together[0].resources == {"CPU": 4, "GPU": 1}
    on_cpus = bundles("cluster.colocated=true", engines=1, ranks=1)
    assert on_cpus[0].resources == {"CPU": 2}


def test_reward_workers_have_bundles_where_they_have_cpus():
    assert shape(bundles("cluster.reward_cpus=2", engines=1, ranks=0, rewards=2)) == [
        [(ENGINE, 0, 0)], [(REWARD, 0, 0)], [(REWARD, 1, 0)]
    ]  # fmt: skip
    assert shape(bundles(engines=1, ranks=0, rewards=2)) == [[(ENGINE, 0, 0)]]
    wanted = bundles("cluster.reward_cpus=2", "cluster.gpus_per_engine=1", rewards=1)
    assert wanted[-1].resources == {"CPU": 2}
    missing = what_is_missing(wanted, [{"CPU": 5, "GPU": 4}])
    assert "1 x reward worker (2 CPUs); nodes: 1 x 5 CPUs, 4 GPUs. 6 CPUs together, and there are 5" in missing
    assert "cluster.reward_cpus" in missing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.tensor_parallel=2", "set tensor_parallel to 1"),
        ("cluster.gpus_per_engine=2", "set gpus_per_engine to 1"),
    ],
)
def test_what_cannot_be_colocated_is_refused(override, message):
    with pytest.raises(InputError, match=message):
        load_settings(None, ["cluster.colocated=true", override])


def test_a_cluster_without_a_place_says_what_was_asked_what_exists_and_what_to_change():
    wanted = bundles("cluster.gpus_per_engine=1", "cluster.learner_cpus=6")
    assert what_is_missing(wanted, [{"CPU": 14, "GPU": 4, "memory": 5.0}]) == ""
    assert what_is_missing(wanted, [{"CPU": 7, "GPU": 2}] * 2) == ""
    short = what_is_missing(wanted, [{"CPU": 7, "GPU": 1}] * 2)
    assert short.startswith(
        "asked for: 2 x learner rank (6 CPUs, 1 GPU), 2 x rollout engine (1 CPU, 1 GPU); nodes: 2 x 7 CPUs, 1 GPU. "
        "4 GPUs together, and there are 2: lower cluster.gpus_per_engine"
    )
    small = what_is_missing(wanted, [{"CPU": 5, "GPU": 8}] * 3)
    assert "No node is large enough for a learner rank (6 CPUs, 1 GPU): lower cluster.learner_cpus" in small
    pieces = what_is_missing(wanted, [{"CPU": 7, "GPU": 1}, {"CPU": 1, "GPU": 8}, {"CPU": 20}])
    assert "not in pieces of these sizes" in pieces
    assert "nodes: none" in what_is_missing(wanted, [])


sizes = st.fixed_dictionaries({"CPU": st.integers(1, 4), "GPU": st.integers(0, 2)})
rooms = st.fixed_dictionaries({"CPU": st.integers(0, 6), "GPU": st.integers(0, 3)})


@given(st.lists(sizes, max_size=5), st.lists(rooms, max_size=3))
def test_places_hold_what_was_given_to_them_and_a_fit_in_equal_sizes_is_always_found(wanted, nodes):
    places = nodes_for(wanted, nodes)
    if places is not None:
        for number, node in enumerate(nodes):
            for name in ("CPU", "GPU"):
                assert (
                    sum(one[name] for one, place in zip(wanted, places, strict=True) if place == number) <= node[name]
                )
    same = [wanted[0]] * len(wanted) if wanted else []
    possible = any(
        all(
            sum(one[name] for one, place in zip(same, choice, strict=True) if place == number) <= node[name]
            for number, node in enumerate(nodes)
            for name in ("CPU", "GPU")
        )
        for choice in itertools.product(range(len(nodes)), repeat=len(same))
    )
    assert (nodes_for(same, nodes) is not None) == possible


def test_a_message_counts_what_is_alike():
    one = Bundle((Process(LEARNER, 0, 1, 0),))
    assert "2 x learner rank (1 CPU); nodes: 1 x 1 CPU." in what_is_missing([one, one], [{"CPU": 1}])
