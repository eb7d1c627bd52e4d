from __future__ import annotations

from typing import get_args

import numpy as np

from curriculum.interactions import UserSequences
from evaluation.baselines import BaselineName, MarkovChain, Popularity
from evaluation.sequential_baselines import SequentialRecommender
from evaluation.tuned_baselines import tuned_baselines
from item_index.neighbours import ItemKNearestNeighbours


def rows(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in lists]


def sequences_of(lists: list[list[int]]) -> UserSequences:
    lengths = [len(row) for row in lists]
    return UserSequences(
        user_ids=tuple(range(len(lists))),
        offsets_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate(rows(*lists)),
        timestamps=np.concatenate([np.arange(length) for length in lengths]),
    )


def cycling(step: int, users: int = 30, length: int = 7, items: int = 20) -> list[list[int]]:
    """Users who go through the catalogue in steps of one size."""
    return [[(3 * user + step * place) % items for place in range(length)] for user in range(users)]


def test_tuning_finds_the_right_window_and_fits_on_what_precedes_the_test() -> None:
    lists = cycling(step=1)
    models = tuned_baselines(sequences_of(lists), 20, neighbours=(5,), shrinks=(0.0,), decays=(0.2, 1.0))
    assert list(models) == ["popularity", "markov", "item_knn"]
    markov_chain, nearest = models["markov"], models["item_knn"]
    assert isinstance(markov_chain, MarkovChain)
    assert markov_chain.window == 1
    assert isinstance(nearest, ItemKNearestNeighbours)
    assert nearest.decay == 0.2  # the next item is close to the last one
    np.testing.assert_array_equal(
        markov_chain.transitions_II.toarray(),
        MarkovChain(1).fit(rows(*(row[:-1] for row in lists)), 20).transitions_II.toarray(),
    )


def test_tuning_for_validation_fits_on_the_train_parts() -> None:
    lists = cycling(step=1)
    models = tuned_baselines(sequences_of(lists), 20, part="validation", neighbours=(5,), decays=(0.2,))
    expected = Popularity().fit(rows(*(row[:-2] for row in lists)), 20).scores(rows([]))
    np.testing.assert_array_equal(models["popularity"].scores(rows([])), expected)


def test_test_targets_play_no_part() -> None:
    lists = cycling(step=1)
    changed = [[*row[:-1], (row[-1] + 7) % 20] for row in lists]
    histories = rows(*(row[:-1] for row in lists))
    one, other = (
        tuned_baselines(
            sequences_of(part), 20, names=get_args(BaselineName), neighbours=(5, 50), shrinks=(0.0,),
            decays=(0.5, 1.0), dropouts=(0.0,), layers=(1,), passes=3,
        )
        for part in (lists, changed)
    )  # fmt: skip
    assert list(one) == list(get_args(BaselineName))
    for name in one:
        np.testing.assert_array_equal(one[name].scores(histories), other[name].scores(histories))


def test_passes_of_a_neural_baseline_are_tuned_and_its_weights_are_fitted_anew() -> None:
    lists = cycling(step=1)
    (found,) = tuned_baselines(
        sequences_of(lists), 20, names=["gru4rec"], dropouts=(0.0, 0.9), layers=(1,), passes=30, seed=3
    ).values()
    assert isinstance(found, SequentialRecommender)
    assert found.dropout == 0.0  # what is certain is learnt best without noise
    assert 1 < found.passes <= 30
    again = SequentialRecommender("gru4rec", dropout=0.0, layers=1, passes=found.passes, seed=3)
    again.fit(rows(*(row[:-1] for row in lists)), 20)
    np.testing.assert_array_equal(found.scores(rows([1, 2])), again.scores(rows([1, 2])))
