from __future__ import annotations

import numpy as np
import pytest
from histories import ITEMS, histories_strategy, rows
from hypothesis import given
from hypothesis import strategies as st

from evaluation.baselines import MarkovChain, Popularity, rank_unseen
from item_index.neighbours import ItemKNearestNeighbours


def test_popularity_counts_interactions() -> None:
    scores = Popularity().fit(rows([0, 1], [1, 2], [1]), 4).scores(rows([0], []))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [[1, 3, 1, 0], [1, 3, 1, 0]])


def test_markov_chain_looks_window_items_ahead_and_not_over_users() -> None:
    train = rows([0, 1, 2], [0, 2], [3])
    next_item = MarkovChain(window=1).fit(train, 4).scores(rows([3, 0], [1], [2], []))
    np.testing.assert_array_equal(next_item, [[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    two_ahead = MarkovChain(window=2).fit(train, 4).scores(rows([0]))
    np.testing.assert_array_equal(two_ahead, [[0, 1, 2, 0]])
    assert two_ahead.dtype == np.float32


@given(histories_strategy, histories_strategy, st.integers(1, 9))
def test_markov_chain_agrees_with_a_loop(train: list[np.ndarray], histories: list[np.ndarray], window: int) -> None:
    counts = np.zeros((ITEMS, ITEMS))
    for row in train:
        for place, item in enumerate(row):
            for later in row[place + 1 : place + 1 + window]:
                counts[item, later] += 1
    expected = [counts[row[-1]] if len(row) else np.zeros(ITEMS) for row in histories]
    np.testing.assert_array_equal(MarkovChain(window).fit(train, ITEMS).scores(histories), expected)


@pytest.mark.parametrize("model", [Popularity(), MarkovChain(), ItemKNearestNeighbours()])
def test_rows_outside_the_catalogue_are_refused(model: Popularity | MarkovChain | ItemKNearestNeighbours) -> None:
    with pytest.raises(ValueError, match="user 1: item 4 is not a row of the 4 items"):
        model.fit(rows([0, 1], [2, 4]), 4)


def test_rank_unseen_masks_the_history_and_breaks_ties_by_row() -> None:
    scores = np.array([[1, 3, 3, 2], [0, 0, 0, 0], [9, 8, 7, 6]], dtype=np.float32)
    before = scores.copy()
    ranked = rank_unseen(scores, rows([1], [], [0, 1, 2]), 3)
    np.testing.assert_array_equal(ranked, [[2, 3, 0], [0, 1, 2], [3, -1, -1]])
    assert ranked.dtype == np.int64
    np.testing.assert_array_equal(scores, before)
    np.testing.assert_array_equal(rank_unseen(scores[:1], rows([]), 6), [[1, 2, 3, 0, -1, -1]])


def test_rank_unseen_takes_whole_numbers_and_minus_infinity() -> None:
    np.testing.assert_array_equal(rank_unseen(np.array([[1, 2, 3]]), rows([2]), 3), [[1, 0, -1]])
    np.testing.assert_array_equal(rank_unseen(np.array([[1.0, -np.inf]]), rows([]), 2), [[0, -1]])


def test_rank_unseen_refuses_bad_input() -> None:
    scores = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="scores of 2 users, but seen items of 1"):
        rank_unseen(scores, rows([0]), 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        rank_unseen(scores, rows([0], [0]), 0)
    with pytest.raises(ValueError, match="user 1: item -1"):
        rank_unseen(scores, rows([0], [-1]), 1)
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="user 1: a score is not a number"):
        rank_unseen(scores, rows([0], [0]), 2)
