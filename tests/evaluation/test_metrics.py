from __future__ import annotations

import itertools
import math
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics import paired_bootstrap, pass_at_k, ranking_metrics

# Four users over 12 items: target first, third, eleventh (beyond every cutoff below 12), and not in a short list.
RANKED = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 11],
        [5, 4, 3, -1, -1, -1, -1, -1, -1, -1, -1, -1],
    ]
)
TARGETS = np.zeros(4, dtype=np.int64)


def test_hand_vectors() -> None:
    metrics = ranking_metrics(RANKED, TARGETS, items=12)
    assert metrics["recall@1"] == 0.25
    assert metrics["recall@5"] == metrics["recall@10"] == 0.5
    assert metrics["recall@50"] == 0.75
    assert metrics["ndcg@5"] == metrics["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / 4)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)
    assert metrics["coverage@10"] == pytest.approx(11 / 12)  # row 11 is never among the first ten
    assert set(metrics) == {
        *(f"recall@{k}" for k in (1, 5, 10, 50)), "ndcg@5", "ndcg@10", "mrr", "coverage@10"
    }  # fmt: skip


def test_end_of_list_is_no_item() -> None:
    ranked = np.full((1, 12), -1)
    metrics = ranking_metrics(ranked, np.array([11]), items=12)
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("user", "place", "item", "problem"),
    [
        (1, 4, 1, "user 1: an item is repeated"),
        (2, 0, 12, "user 2: the list has an entry outside"),
        (2, 0, -2, "user 2: the list has an entry outside"),
        (3, 5, 0, "user 3: the list goes on after its end"),
    ],
)
def test_bad_list_names_the_user(user: int, place: int, item: int, problem: str) -> None:
    ranked = RANKED.copy()
    ranked[user, place] = item
    with pytest.raises(ValueError, match=problem):
        ranking_metrics(ranked, TARGETS, items=12)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="user 2: the target"):
        ranking_metrics(RANKED, np.array([0, 0, 12, 0]), items=12)
    with pytest.raises(ValueError, match="no users"):
        ranking_metrics(RANKED[:0], TARGETS[:0], items=12)
    with pytest.raises(ValueError, match="do not go with"):
        ranking_metrics(RANKED, TARGETS[:3], items=12)
    with pytest.raises(ValueError, match="integers"):
        ranking_metrics(RANKED.astype(float), TARGETS, items=12)
    # A target at place 13 would be lost without notice.
    with pytest.raises(ValueError, match="12 items cannot be measured at 50"):
        ranking_metrics(RANKED, TARGETS, items=100)


@given(st.data())
def test_agrees_with_a_loop(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 15))
    lists = data.draw(
        st.lists(st.tuples(st.permutations(range(items)), st.integers(0, items), st.integers(0, items - 1)), min_size=1)
    )
    ranked = np.array([[*order[:length], *[-1] * (items - length)] for order, length, _ in lists])
    targets = np.array([target for *_, target in lists])
    metrics = ranking_metrics(ranked, targets, items=items)
    places = [
        list(order[:length]).index(target) + 1 if target in order[:length] else math.inf
        for order, length, target in lists
    ]
    for k in (1, 5, 10, 50):
        assert metrics[f"recall@{k}"] == pytest.approx(mean(place <= k for place in places))
    for k in (5, 10):
        gains = [1 / math.log2(place + 1) if place <= k else 0 for place in places]
        assert metrics[f"ndcg@{k}"] == pytest.approx(mean(gains))
    assert metrics["mrr"] == pytest.approx(mean(1 / place for place in places))
    shown = {item for order, length, _ in lists for item in order[: min(length, 10)]}
    assert metrics["coverage@10"] == pytest.approx(len(shown) / items)


def test_pass_at_k_hand_vectors() -> None:
    hits = np.zeros((3, 10), dtype=bool)
    hits[0, 3] = True
    hits[1, :7] = True
    assert pass_at_k(hits, 1) == pytest.approx((0.1 + 0.7 + 0) / 3)
    assert pass_at_k(hits, 4) == pytest.approx((0.4 + 1 + 0) / 3)  # three misses cannot fill four places
    assert pass_at_k(hits, 10) == pytest.approx(2 / 3)
    assert pass_at_k(hits[:1].repeat(50, axis=0), 4) == pytest.approx(0.4)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(hits: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(hits)))
    subsets = list(itertools.combinations(hits, k))
    assert pass_at_k(np.array([hits]), k) == pytest.approx(mean(any(subset) for subset in subsets))


def test_pass_at_k_of_many_responses_does_not_overflow() -> None:
    hits = np.zeros((1, 5000), dtype=bool)
    hits[0, 0] = True
    assert pass_at_k(hits, 2500) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 11])
def test_pass_at_k_refuses_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(np.zeros((2, 10), dtype=bool), k)


def test_pass_at_k_refuses_counts() -> None:
    with pytest.raises(ValueError, match="bool"):
        pass_at_k(np.zeros((2, 10)), 1)


def test_bootstrap_interval() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=400)
    b = a + 0.3 + generator.normal(scale=0.5, size=400)  # paired: the spread of a itself plays no part
    difference, low, high = paired_bootstrap(a, b, seed=1)
    assert difference == pytest.approx((b - a).mean())
    half = 1.96 * (b - a).std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.01)
    assert paired_bootstrap(a, b, seed=1) == (difference, low, high)
    assert paired_bootstrap(a, b, seed=2) != (difference, low, high)
    assert paired_bootstrap(b, a, seed=1) == pytest.approx((-difference, -high, -low))


def test_bootstrap_of_equal_systems_and_bad_input() -> None:
    hits = np.array([True, False, True])
    assert paired_bootstrap(hits, hits, samples=10, seed=0) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(np.zeros(3, dtype=bool), np.ones(3, dtype=bool), samples=10, seed=0) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap(hits, hits[:2], seed=0)
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap(hits[:0], hits[:0], seed=0)
    with pytest.raises(ValueError, match="samples"):
        paired_bootstrap(hits, hits, samples=0, seed=0)
