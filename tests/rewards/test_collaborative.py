"""The collaborative reward against the scores that it is made of."""

import math
from dataclasses import replace

import numpy as np
import pytest

from item_index.neighbours import ItemKNearestNeighbours
from rewards.collaborative import CollaborativeReward
from rewards.composition import RewardSample, load_reward_term

ITEM_IDS = ("a", "b", "c", "d", "e")
TRAIN = [np.array(row) for row in ([0, 1, 2], [0, 1], [1, 2], [3, 0], [4])]
SAMPLE = RewardSample(
    mode="direct", tokens=(), history=("a",), true_item="d", answered_item="b", true_codes=(0,), answered_codes=(1,),
    levels=1, well_formed=True, forced=False, decode=lambda tokens: "",
)  # fmt: skip


@pytest.fixture
def reward():
    return CollaborativeReward(ItemKNearestNeighbours(decay=0.5).fit(TRAIN, len(ITEM_IDS)), ITEM_IDS)


def test_it_is_the_discounted_gain_of_the_place_among_unseen_items(reward):
    # Cosines of item a (3 users): b 2 / sqrt(3 * 3), d 1 / sqrt(3 * 1), c 1 / sqrt(3 * 2), e none.
    assert reward(SAMPLE) == 1
    assert reward(replace(SAMPLE, answered_item="d")) == pytest.approx(1 / math.log2(3))
    assert reward(replace(SAMPLE, answered_item="c")) == pytest.approx(1 / 2)
    assert reward(replace(SAMPLE, answered_item="e")) == 0
    # Of another history; its own items, the best of all here, take no place. b is a step back and counts half.
    after_b_and_a = {"c": 2 / 6**0.5 * 0.5 + 1 / 6**0.5, "d": 1 / 3**0.5}
    assert after_b_and_a["c"] > after_b_and_a["d"]
    assert reward(replace(SAMPLE, history=("b", "a"), answered_item="c")) == 1
    assert reward(replace(SAMPLE, history=("b", "a"), answered_item="d")) == pytest.approx(1 / math.log2(3))
    assert reward(SAMPLE) == 1


def test_of_equal_scores_the_lower_row_comes_first():
    train = [np.array(row) for row in ([0, 1], [0, 2], [0, 3])]
    reward = CollaborativeReward(ItemKNearestNeighbours().fit(train, len(ITEM_IDS)), ITEM_IDS)
    assert reward.gains(["a"]).tolist() == pytest.approx([0, 1, 1 / math.log2(3), 1 / 2, 0])


def test_what_is_no_answer_an_item_of_the_history_or_without_neighbours_gets_nothing(reward):
    assert reward(replace(SAMPLE, well_formed=False)) == 0
    assert reward(replace(SAMPLE, answered_item=None)) == 0
    assert reward(replace(SAMPLE, answered_item="a")) == 0
    assert reward(replace(SAMPLE, history=("e",))) == 0
    assert reward(replace(SAMPLE, history=())) == 0


def test_the_true_item_plays_no_part(reward):
    assert reward(replace(SAMPLE, true_item="b")) == reward(SAMPLE)


def test_the_term_has_to_be_fitted(reward):
    term = load_reward_term("collaborative", weight=2.0, collaborative=reward)
    assert (term.name, term.weight, term.built_in, term.value(SAMPLE)) == ("collaborative", 2.0, True, 1.0)
    with pytest.raises(ValueError, match="not fitted"):
        load_reward_term("collaborative").value(SAMPLE)


def test_a_gain_is_divided_by_the_items_usual_gain():
    neighbours = ItemKNearestNeighbours(decay=0.5).fit(TRAIN, len(ITEM_IDS))
    plain = CollaborativeReward(neighbours, ITEM_IDS)
    reward = CollaborativeReward(neighbours, ITEM_IDS, [np.array([0]), np.array([2]), np.array([1, 0]), np.array([4])])
    # Over these histories item d is second, without a vote, second; item c third, shown itself, first.
    second, third = 1 / math.log2(3), 1 / 2
    assert [plain.gains(history)[3] for history in ("a", "c", "ba", "e")] == pytest.approx([second, 0, second, 0])
    assert reward.gains(["a"])[3] == pytest.approx(second / second)
    assert [plain.gains(history)[2] for history in ("a", "c", "ba", "e")] == pytest.approx([third, 0, 1, 0])
    assert reward.gains(["a"])[2] == pytest.approx(third / ((1 + third**2) / (1 + third)))
    assert reward.gains("a")[4] == 0
    assert reward(replace(SAMPLE, answered_item="c")) == pytest.approx(reward.gains(["a"])[2])
