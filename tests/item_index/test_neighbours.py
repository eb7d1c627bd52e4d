from __future__ import annotations

import math

import numpy as np
from histories import ITEMS, histories_strategy, rows
from hypothesis import given
from hypothesis import strategies as st

from item_index.neighbours import ItemKNearestNeighbours


def test_neighbours_by_cosine_with_recency() -> None:
    train = rows([0, 1], [0, 1], [0, 2])
    similar = [1, 2 / math.sqrt(3 * 2), 1 / math.sqrt(3)]  # of item 0 to items 1 and 2
    model = ItemKNearestNeighbours(neighbours=10, shrink=0.0, decay=0.5).fit(train, 4)
    np.testing.assert_allclose(model.scores(rows([0])), [[0, similar[1], similar[2], 0]], rtol=1e-6)
    # One step back counts half; items of the history are scored as well.
    np.testing.assert_allclose(
        model.scores(rows([2, 0])), [[0.5 * similar[2], similar[1], similar[2], 0]], rtol=1e-6
    )  # fmt: skip
    nearest = ItemKNearestNeighbours(neighbours=1, shrink=0.0).fit(train, 4)
    np.testing.assert_allclose(nearest.scores(rows([0])), [[0, similar[1], 0, 0]], rtol=1e-6)


def test_neighbours_vote_for_the_last_20_items_only() -> None:
    train = rows([0, 1], [2, 3])
    model = ItemKNearestNeighbours(decay=1.0).fit(train, 4)
    assert model.scores(rows([0, *[2] * 19]))[0, 1] > 0
    assert model.scores(rows([0, *[2] * 20]))[0, 1] == 0


@given(
    histories_strategy,
    histories_strategy,
    st.integers(1, ITEMS),
    st.sampled_from([0.0, 2.5]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_neighbours_agree_with_a_loop(
    train: list[np.ndarray], histories: list[np.ndarray], neighbours: int, shrink: float, decay: float, discount: float
) -> None:
    has = np.array([[item in row for item in range(ITEMS)] for row in train], dtype=float)
    similarity = np.zeros((ITEMS, ITEMS))
    for item in range(ITEMS):
        for other in range(ITEMS):
            together = float(has[:, item] @ has[:, other])
            if item != other and together:
                similarity[item, other] = together / (math.sqrt(has[:, item].sum() * has[:, other].sum()) + shrink)
                similarity[item, other] /= has[:, other].sum() ** discount
        similarity[item, np.argsort(-similarity[item], kind="stable")[neighbours:]] = 0
    expected = np.zeros((len(histories), ITEMS))
    for user, row in enumerate(histories):
        for back, item in enumerate(row[::-1]):
            expected[user] += decay**back * similarity[item]
    model = ItemKNearestNeighbours(neighbours, shrink, decay, discount).fit(train, ITEMS)
    np.testing.assert_allclose(model.scores(histories), expected, rtol=1e-5, atol=1e-7)


def test_votes_are_divided_by_a_power_of_the_items_popularity():
    # Items 1 and 2 came with item 0 once each, item 2 five times more without it.
    train = rows([0, 1], [0, 2], *[[2]] * 5)
    plain = ItemKNearestNeighbours(decay=1.0).fit(train, 3).scores(rows([0]))[0]
    discounted = ItemKNearestNeighbours(decay=1.0, popularity_discount=0.5).fit(train, 3).scores(rows([0]))[0]
    np.testing.assert_allclose(discounted, plain / np.array([2, 1, 6]) ** 0.5, rtol=1e-6)
