from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.residual import residual_sensitive_reward

TRUTH = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ((1, 2, 3, 4), TRUTH, 1.0),
        ((1, 9, 9, 9), TRUTH, 0.5),
        ((1, 2, 9, 9), TRUTH, math.sqrt(0.5)),
        ((1, 2, 3, 9), TRUTH, math.sqrt(0.75)),
        ((1, 2, 3, 4, 0), TRUTH, 0.95),  # spurious collision code
        ((9, 2, 9, 9), TRUTH, 0.0),  # right second code under a wrong first one
        ((1, 9, 3, 4), TRUTH, 0.5),  # right codes below a wrong one
        ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), 1.0),
        ((1, 2, 3, 4), (1, 2, 3, 4, 5), 0.95),  # collision code missing
        ((1, 2, 3, 4, 6), (1, 2, 3, 4, 5), 0.95),  # collision code wrong
        ((1, 2, 3, 9, 5), (1, 2, 3, 4, 5), math.sqrt(0.75)),
        ((1, 2), TRUTH, math.sqrt(0.5)),
        ((), TRUTH, 0.0),
    ],
)
def test_vectors(answer: tuple[int, ...], truth: tuple[int, ...], expected: float) -> None:
    assert residual_sensitive_reward(answer, truth) == pytest.approx(expected, abs=1e-15)


def test_exact_item_is_exactly_one() -> None:
    assert residual_sensitive_reward([1, 2, 3, 4], TRUTH) == 1.0


@pytest.mark.parametrize("answer", [(1, 2, 3, 4), (1, 2, 3, 9), (9, 9, 9, 9)])
def test_malformed_response_earns_nothing(answer: tuple[int, ...]) -> None:
    assert residual_sensitive_reward(answer, TRUTH, well_formed=False) == 0.0


def test_other_number_of_levels() -> None:
    assert residual_sensitive_reward([1, 9, 9], [1, 2, 3], levels=3) == pytest.approx(math.sqrt(1 / 3))
    assert residual_sensitive_reward([1, 2, 3, 7], [1, 2, 3], levels=3) == 0.95
    # With many levels the root of l / H passes the cap before the last level.
    assert residual_sensitive_reward([0] * 15 + [1], [0] * 16, levels=16) == 0.95


@pytest.mark.parametrize(("truth", "levels"), [((1, 2, 3), 4), ((1, 2, 3, 4, 5, 6), 4), ((), 4), ((1,), 0)])
def test_impossible_truth_is_refused(truth: tuple[int, ...], levels: int) -> None:
    with pytest.raises(ValueError, match=r"truth has|levels must be"):
        residual_sensitive_reward(TRUTH, truth, levels=levels)


def literal_reward(answer: tuple[int, ...], truth: tuple[int, ...], levels: int) -> float:
    if answer == truth:
        return 1.0
    lengths = [l for l in range(min(len(answer), len(truth)) + 1) if answer[:l] == truth[:l]]  # noqa: E741
    return 0.0 if max(lengths) == 0 else min(math.sqrt(max(lengths) / levels), 0.95)


@given(st.data())
def test_agrees_with_the_formula(data: st.DataObject) -> None:
    levels = data.draw(st.integers(1, 6))
    code = st.integers(0, 2)
    truth = tuple(data.draw(st.lists(code, min_size=levels, max_size=levels + 1)))
    answer = tuple(data.draw(st.lists(code, max_size=levels + 1)))
    reward = residual_sensitive_reward(answer, truth, levels=levels)
    assert reward == literal_reward(answer, truth, levels)
    assert (reward == 1.0) == (answer == truth)
