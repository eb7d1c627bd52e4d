"""Real reward workers with rewards that raise, hang, lie, kill and stop their process."""

import numpy as np
import pytest
import ray
from reward_functions import TROUBLE

from actors.reward import RewardWorker
from cluster.placement import placed
from cluster.reward_pool import RewardPool
from cluster.settings import load_settings
from item_index.input_error import InputError

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
MODES = ["direct", "reasoning"] * 8
RESPONSES = 3
SEEDS = (9, 11)  # the first batch has every kind of trouble, the second one group for each way to lose a worker


@pytest.fixture(scope="module")
def batches(tiny):
    """Rollouts of two engines, as the pool gets them."""
    parts = [tiny.random_rollouts(tiny.prompts(MODES), responses=RESPONSES, seed=seed) for seed in SEEDS]
    return parts, [ray.put(part) for part in parts]


@pytest.fixture
def pool(tiny, ray_cluster):
    """Makes a pool from import paths."""
    pools = []
    nowhere = None  # workers without CPUs of their own have no place

    def make(*rewards, workers=2, **cluster):
        values = {"reward_workers": workers, "reward_grace_seconds": 2, **cluster}
        terms = [reward if isinstance(reward, dict) else {"reward": reward} for reward in rewards]
        settings = load_settings(
            None,
            [f"cluster.{name}={value}" for name, value in values.items()]
            + [f"train.rewards={terms}", "train.reward_seconds=0.2"],
        )
        pools.append(RewardPool(nowhere, settings, str(tiny.index_folder), str(tiny.checkpoint)))
        pools[-1].wait_until_started()
        return pools[-1]

    yield make
    for one in pools:
        one.close()


@pytest.fixture(scope="module")
def expected(tiny, batches):
    """What a single worker without a pool gives for the built-in reward."""
    worker = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint))
    return [worker.score(part) for part in batches[0]]


def score(made, batches):
    parts, references = batches
    return made.score(references, [len(part) for part in parts], responses=RESPONSES)


def test_workers_with_cpus_of_their_own_are_in_their_bundles_and_come_back_there(tiny, ray_cluster, batches, expected):
    settings = load_settings(None, ["cluster.reward_cpus=0.5", "cluster.reward_workers=2"])
    with placed(settings.cluster, engines=0, reward_workers=2) as placement:
        made = RewardPool(placement, settings, str(tiny.index_folder), str(tiny.checkpoint))
        made.wait_until_started()
        ray.kill(made.workers[1].actor)
        for scores, own in zip(score(made, batches), expected, strict=True):
            np.testing.assert_array_equal(scores.rewards, own.rewards)
        assert made.restarts == 1
        table = ray.util.placement_group_table(placement.group)
        assert [bundle["CPU"] for bundle in table["bundles"].values()] == [0.5, 0.5]
        made.close()


def test_any_number_of_workers_gives_what_one_gives(pool, batches, expected):
    for workers in (1, 3):
        scores = score(pool("residual_sensitive", workers=workers), batches)
        for one, other in zip(scores, expected, strict=True):
            for name in ("group_sizes", "scored", "rewards", "hits", "valid", "items", "lengths", "chains"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
            assert one.scored.all()
            assert one.failures == ()


def test_rewards_are_summed_up_by_their_weights(pool, batches, expected, tiny):
    made = pool(
        {"reward": "residual_sensitive", "weight": 0.5}, {"reward": "reward_functions:length_penalty"},
        {"reward": "reward_functions:Novelty", "weight": -2, "name": "novelty"},
    )  # fmt: skip
    assert made.terms == ["residual_sensitive", "length_penalty", "novelty"]
    for scores, plain, part in zip(score(made, batches), expected, batches[0], strict=True):
        np.testing.assert_array_equal(scores.components[:, 0], plain.rewards)
        np.testing.assert_allclose(scores.components[:, 1], -0.01 * plain.lengths, rtol=1e-6)
        histories = [[(3 * row + step) % len(tiny.index) for step in range(4)] for row in range(len(part))]
        new = [item not in range(5) and item not in histories[row // RESPONSES] for row, item in enumerate(plain.items)]
        np.testing.assert_array_equal(scores.components[:, 2], new)
        np.testing.assert_allclose(scores.rewards, scores.components @ np.float32([0.5, 1, -2]), rtol=1e-6)


def test_a_reward_that_fails_costs_the_group_alone_and_is_reported_with_the_sample(pool, batches, expected):
    scores = score(pool("reward_functions:troubled"), batches)
    found = set()
    for one, plain in zip(scores, expected, strict=True):
        items_GN = plain.items.reshape(-1, RESPONSES)
        guilty = np.isin(items_GN, list(TROUBLE)).any(axis=1)
        np.testing.assert_array_equal(one.scored, ~guilty)
        np.testing.assert_array_equal(one.rewards, np.where(np.repeat(guilty, RESPONSES), np.float32("nan"), 1))
        np.testing.assert_array_equal(one.items, plain.items)
        assert [failure.group for failure in one.failures] == np.nonzero(guilty)[0].tolist()
        for failure in one.failures:
            item = items_GN[failure.group, failure.response]
            assert not np.isin(items_GN[failure.group, : failure.response], list(TROUBLE)).any(), "the first one"
            assert (failure.term, failure.problem) == ("troubled", TROUBLE[item])
            assert f"{MODES[failure.group]} mode, true item " in failure.context
            assert "response '" in failure.context
            found.add(item)
    assert found == set(TROUBLE), "every kind of trouble is among the groups"
    assert any(one.scored.any() for one in scores)


def test_a_worker_that_is_lost_is_replaced_and_only_the_group_at_fault_is_given_up(pool, batches, expected):
    made = pool("reward_functions:deadly", maximum_restarts=10)
    (scores,) = score(made, [some[1:] for some in batches])
    items_GN = expected[1].items.reshape(-1, RESPONSES)
    guilty = np.isin(items_GN, [7, 15]).any(axis=1)
    np.testing.assert_array_equal(scores.scored, ~guilty)
    assert (scores.rewards.reshape(-1, RESPONSES)[~guilty] == 1).all()
    assert [failure.group for failure in scores.failures] == np.nonzero(guilty)[0].tolist()
    for failure in scores.failures:
        first = next(item for item in items_GN[failure.group] if item in (7, 15))
        cause = {7: "died", 15: "did not answer in time"}[first]
        assert failure.problem.startswith("reward worker ")
        assert failure.problem.endswith(f"{cause} while it scored this group")
    assert {failure.problem[len("reward worker 0 ") :] for failure in scores.failures} == {
        "died while it scored this group", "did not answer in time while it scored this group",
    }  # fmt: skip
    assert made.restarts >= 2


def test_a_replacement_that_is_lost_before_it_has_started_is_replaced_as_well(pool, batches, expected, monkeypatch):
    made = pool("residual_sensitive")
    start, started = made._start, []

    def start_and_lose_the_first(number):
        started.append(start(number))
        if len(started) == 1:
            ray.kill(started[0])
        return started[-1]

    monkeypatch.setattr(made, "_start", start_and_lose_the_first)
    ray.kill(made.workers[0].actor)
    for scores, own in zip(score(made, batches), expected, strict=True):
        np.testing.assert_array_equal(scores.rewards, own.rewards)
    assert made.restarts == len(started) == 2
    assert made.workers[0].failures == 0


def test_a_worker_that_is_lost_again_and_again_ends_the_stage_and_is_named(pool, batches):
    made = pool("reward_functions:always_dies", workers=1, maximum_restarts=1)
    with pytest.raises(RuntimeError, match="reward worker 0 died, 2 times in a row"):
        score(made, batches)


def test_a_wrong_path_is_known_before_anything_starts(pool):
    with pytest.raises(InputError, match="no_such_module_here"):
        pool("no_such_module_here:reward")
