from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.sequential_baselines import SequentialArchitecture, SequentialRecommender, training_windows
from item_index.ragged import RaggedArray

ITEMS = 20
ARCHITECTURES: tuple[SequentialArchitecture, ...] = ("sasrec", "gru4rec")


def rows(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in lists]


def cycles(step: int) -> list[np.ndarray]:
    return [(3 * user + step * np.arange(9)) % ITEMS for user in range(40)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 7), st.integers(0, 99))
def test_every_item_but_a_first_is_a_target_once_behind_what_precedes_it(
    lengths: list[int], window: int, seed: int
) -> None:
    users = [np.arange(length) + 100 * user for user, length in enumerate(lengths)]
    windows = training_windows(RaggedArray.of(users, np.int64), window, np.random.default_rng(seed))
    assert windows.shape[1] == window + 1
    targets = []
    for row in windows:
        inside = row[row >= 0]
        assert len(inside) >= 2
        np.testing.assert_array_equal(row[len(inside) :], -1)
        np.testing.assert_array_equal(np.diff(inside), 1)  # of one user, in order, without a gap
        targets += inside[1:].tolist()
    assert sorted(targets) == [item for user in users for item in user[1:].tolist()]


def test_borders_of_windows_are_drawn() -> None:
    row = RaggedArray.of([np.arange(100)], np.int64)
    generator = np.random.default_rng(0)
    assert len({tuple(training_windows(row, 10, generator)[1].tolist()) for _ in range(30)}) > 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_next_item_is_learnt_and_the_order_is_read(architecture: SequentialArchitecture) -> None:
    # Where a user goes depends on the way by which they came: by one step or by two.
    model = SequentialRecommender(architecture, width=32, dropout=0.0, passes=80, learning_rate=5e-3, window=6)
    model.fit(cycles(1) + cycles(2), ITEMS)
    scores = model.scores(rows([4, 5, 6], [2, 4, 6], [17, 18, 19], [15, 17, 19]))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores.argmax(axis=1), [7, 8, 0, 1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_one_history(architecture: SequentialArchitecture) -> None:
    model = SequentialRecommender(architecture, width=8, passes=1, window=4).fit(cycles(1), ITEMS)
    histories = rows([9, 1, 2, 3, 4], [1, 2, 3, 4], [3], [])
    together = model.scores(histories)
    np.testing.assert_array_equal(together[0], together[1])  # what lies before the window is not read
    np.testing.assert_array_equal(together[3], np.zeros(ITEMS))
    for history, expected in zip(histories, together, strict=True):  # nor is another history of the batch, nor filling
        np.testing.assert_allclose(model.scores([history])[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_seed_fixes_the_training_and_leaves_the_callers_random_numbers_alone(
    architecture: SequentialArchitecture,
) -> None:
    def scores(seed: int) -> np.ndarray:
        model = SequentialRecommender(architecture, width=8, layers=2, passes=2, seed=seed)
        for _ in model.training(cycles(1), ITEMS):
            model.scores(rows([1]))  # a look in between changes nothing
            torch.rand(seed + 1)
        return model.scores(rows([1, 2]))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = SequentialRecommender(architecture, width=8, layers=2, passes=2).fit(cycles(1), ITEMS)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(scores(0), model.scores(rows([1, 2])))
    assert (scores(0) != scores(1)).any()


def test_what_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(ValueError, match="a training item is not a row of the 3 items"):
        SequentialRecommender("sasrec").fit(rows([0, 3]), 3)
    with pytest.raises(ValueError, match="nobody has two items"):
        SequentialRecommender("gru4rec").fit(rows([0], []), 3)
