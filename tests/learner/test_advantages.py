from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import (
    bonus_calibrated_advantages,
    group_advantages,
    group_relative_advantages,
    groups_with_variance,
)

EPS = 1e-6


def sizes_of(rewards_GN: torch.Tensor) -> torch.Tensor:
    return torch.full((len(rewards_GN),), rewards_GN.shape[1])


def relative(rewards_GN: torch.Tensor) -> torch.Tensor:
    return group_relative_advantages(rewards_GN.flatten(), sizes_of(rewards_GN)).view_as(rewards_GN)


def calibrated(rewards_GN: torch.Tensor, *, hits_GN: torch.Tensor | None = None, k: int = 4) -> torch.Tensor:
    hits_R = None if hits_GN is None else hits_GN.flatten()
    sizes = sizes_of(rewards_GN)
    return bonus_calibrated_advantages(rewards_GN.flatten(), sizes, k=k, hits_R=hits_R).view_as(rewards_GN)


def varied(rewards_GN: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    return groups_with_variance(rewards_GN.flatten(), sizes_of(rewards_GN), tolerance)


def combinations(a: int, b: int) -> int:
    return math.comb(a, b) if a >= b else 0


def literal_relative(rewards: list[float], eps: float) -> list[float]:
    n = len(rewards)
    if n == 1:
        return [0.0]
    mean = math.fsum(rewards) / n
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (n - 1))
    return [(reward - mean) / (std + eps) for reward in rewards]


def literal_bonus(hits: list[bool], k: int, eps: float) -> list[float]:
    n, c = len(hits), sum(hits)
    if n < k:
        return [0.0] * n
    rho = 1 - combinations(n - c, k) / combinations(n, k)
    sigma = math.sqrt(rho * (1 - rho))
    positive = (1 - rho) / (sigma + eps)
    negative = (1 - rho - combinations(n - c - 1, k - 1) / combinations(n - 1, k - 1)) / (sigma + eps)
    return [positive if hit else negative for hit in hits]


def bonus(hits: list[bool], k: int = 4) -> torch.Tensor:
    """The bonus alone: a group without variance has no other advantage."""
    rewards = torch.full((1, len(hits)), 0.5, dtype=torch.float64)
    return calibrated(rewards, k=k, hits_GN=torch.tensor([hits]))[0]


@pytest.mark.parametrize(
    ("c", "positive", "negative"),
    [
        (1, 1.2247, -0.1361),
        (2, 0.7071, -0.1768),
        (3, 0.4472, -0.1917),
        (4, 0.2773, -0.1849),
        (5, 0.1562, -0.1562),
        (6, 0.0692, -0.1038),
    ],
)
def test_table_for_ten_responses(c: int, positive: float, negative: float) -> None:
    values = bonus([True] * c + [False] * (10 - c))
    torch.testing.assert_close(values[:c], torch.full((c,), positive, dtype=torch.float64), atol=6e-5, rtol=0)
    torch.testing.assert_close(values[c:], torch.full((10 - c,), negative, dtype=torch.float64), atol=6e-5, rtol=0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0] + [0.0] * 9, [4.071] + [-0.452] * 9),
        ([1.0, 0.95] + [0.5] * 3 + [0.0] * 5, [2.850, 1.365] + [0.248] * 3 + [-0.992] * 5),
        ([0.5] + [0.0] * 9, [2.846] + [-0.316] * 9),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples(rewards: list[float], expected: list[float], dtype: torch.dtype) -> None:
    advantages = calibrated(torch.tensor([rewards], dtype=dtype))
    assert advantages.dtype == dtype
    torch.testing.assert_close(advantages, torch.tensor([expected], dtype=dtype), atol=6e-4, rtol=0)


def test_plain_group_relative_example() -> None:
    advantages = relative(torch.tensor([[1.0] + [0.0] * 9]))
    torch.testing.assert_close(advantages, torch.tensor([[2.846] + [-0.316] * 9]), atol=6e-4, rtol=0)


@pytest.mark.parametrize("c", [0, 7, 8, 9, 10])
def test_bonus_is_zero_without_a_hit_and_with_fewer_than_k_misses(c: int) -> None:
    assert (bonus([True] * c + [False] * (10 - c)) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_bonus_is_zero_for_fewer_than_k_responses(n: int) -> None:
    rewards = torch.tensor([[1.0] + [0.0] * (n - 1)])
    assert torch.equal(calibrated(rewards, k=4), relative(rewards))


def test_bonus_is_largest_for_a_single_hit() -> None:
    values = [float(bonus([True] * c + [False] * (10 - c))[0]) for c in range(1, 11)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[1]


def test_group_of_one_has_no_advantage() -> None:
    rewards = torch.tensor([[1.0], [0.0], [0.5]])
    assert torch.equal(relative(rewards), torch.zeros(3, 1))
    assert torch.equal(calibrated(rewards, k=1), torch.zeros(3, 1))
    assert not varied(rewards, tolerance=0.0).any()


def test_equal_float32_rewards_have_no_advantage() -> None:
    rewards = torch.full((1, 10), math.sqrt(0.75), dtype=torch.float32)
    assert relative(rewards).abs().max() < 1e-8
    assert not varied(rewards).any()


def test_groups_with_variance() -> None:
    rewards = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.7071], [0.0, 1.0, 0.0], [0.5, 0.5 + 6e-7, 0.5]])
    assert varied(rewards).tolist() == [False, True, True, False]
    assert varied(rewards, tolerance=0.3).tolist() == [False, False, True, False]


def test_hits_on_their_own() -> None:
    # A composed reward never equals 1; the exact item is the second response.
    rewards = torch.tensor([[0.3, 1.2, 0.4, 0.1, 0.2]], dtype=torch.float64)
    hits = [False, True, False, False, False]
    expected = [
        a + b for a, b in zip(literal_relative(rewards[0].tolist(), EPS), literal_bonus(hits, 4, EPS), strict=True)
    ]
    passed = calibrated(rewards, hits_GN=torch.tensor([hits]))
    torch.testing.assert_close(passed, torch.tensor([expected], dtype=torch.float64))
    assert torch.equal(calibrated(rewards), relative(rewards))


groups = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 0.75**0.5, 0.95, 1.0]), min_size=n, max_size=n), min_size=1, max_size=4
    )
)


@given(groups, st.integers(1, 6))
def test_agrees_with_the_formulas(rewards: list[list[float]], k: int) -> None:
    rewards_GN = torch.tensor(rewards, dtype=torch.float64)
    plain = relative(rewards_GN)
    whole = calibrated(rewards_GN, k=k)
    expected_relative = [literal_relative(group, EPS) for group in rewards]
    expected = [
        [a + b for a, b in zip(row, literal_bonus([reward == 1 for reward in group], k, EPS), strict=True)]
        for row, group in zip(expected_relative, rewards, strict=True)
    ]
    torch.testing.assert_close(plain, torch.tensor(expected_relative, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(whole, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-9)
    assert torch.isfinite(whole).all()


@given(st.lists(st.booleans(), min_size=1, max_size=64), st.integers(1, 8))
def test_bonus_sums_to_zero(hits: list[bool], k: int) -> None:
    values = bonus(hits, k)
    assert abs(float(values.sum())) < 1e-8
    torch.testing.assert_close(
        values, torch.tensor(literal_bonus(hits, k, EPS), dtype=torch.float64), atol=1e-8, rtol=1e-9
    )


@given(groups, st.integers(1, 6))
def test_groups_do_not_touch_each_other(rewards: list[list[float]], k: int) -> None:
    rewards_GN = torch.tensor(rewards)
    apart = torch.cat([calibrated(group[None], k=k) for group in rewards_GN])
    torch.testing.assert_close(calibrated(rewards_GN, k=k), apart)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.95, 1.0]), min_size=1, max_size=9), min_size=1, max_size=5))
def test_groups_of_unequal_size_are_computed_as_each_alone(rewards: list[list[float]]) -> None:
    flat = torch.tensor([reward for group in rewards for reward in group])
    sizes = torch.tensor([len(group) for group in rewards])
    for estimator in ("bonus_calibrated", "group_relative", "centred", "pass_at_k"):
        apart = [
            group_advantages(group, group == 1, torch.tensor([len(group)]), estimator, k=3)  # type: ignore[arg-type]
            for group in flat.split(sizes.tolist())
        ]
        together = group_advantages(flat, flat == 1, sizes, estimator, k=3)  # type: ignore[arg-type]
        torch.testing.assert_close(together, torch.cat(apart))
    ranges = [max(group) - min(group) > 0 for group in rewards]
    assert groups_with_variance(flat, sizes).tolist() == ranges


@pytest.mark.parametrize(
    ("rewards", "sizes", "message"),
    [
        (torch.zeros(3, 1), torch.tensor([3]), r"must be float \[responses\]"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([2]), "must be float"),
        (torch.zeros(3), torch.tensor([3, 0]), "at least 1"),
        (torch.zeros(3), torch.tensor([2.0, 1.0]), "must be int64"),
        (torch.zeros(3), torch.tensor([2]), "2 responses, but there are 3 rewards"),
        (torch.tensor([0.0, 1.0, 0.0, math.nan]), torch.tensor([3, 1]), "group 1, response 0 has the reward nan"),
        (torch.tensor([0.0, math.inf, 0.0]), torch.tensor([3]), "group 0, response 1 has the reward inf"),
    ],
)
def test_bad_rewards_are_refused(rewards: torch.Tensor, sizes: torch.Tensor, message: str) -> None:
    for function in (group_relative_advantages, bonus_calibrated_advantages, groups_with_variance):
        with pytest.raises(ValueError, match=message):
            function(rewards, sizes)


def test_bad_hits_and_k_are_refused() -> None:
    with pytest.raises(ValueError, match="hits_R must be bool"):
        calibrated(torch.zeros(1, 4), hits_GN=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="hits_R must be bool of shape"):
        calibrated(torch.zeros(1, 4), hits_GN=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="k must be at least 1"):
        calibrated(torch.zeros(1, 4), k=0)


def test_named_estimators() -> None:
    rewards = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    hits = torch.tensor([[True, False, False, False], [True, True, False, False]])

    def named(estimator: str) -> torch.Tensor:
        values = group_advantages(rewards.flatten(), hits.flatten(), sizes_of(rewards), estimator, k=2)  # type: ignore[arg-type]
        return values.view_as(rewards)

    torch.testing.assert_close(named("centred"), torch.tensor([[0.625, 0.125, -0.375, -0.375], [0.25] * 3 + [-0.75]]))
    expected = torch.tensor([literal_bonus(row, 2, EPS) for row in hits.tolist()])
    torch.testing.assert_close(named("pass_at_k"), expected)
    torch.testing.assert_close(named("group_relative"), relative(rewards))
    torch.testing.assert_close(named("bonus_calibrated"), named("group_relative") + expected)
    with pytest.raises(ValueError, match="no advantage estimator 'best'"):
        named("best")
