from __future__ import annotations

import itertools
import math
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from evaluation.metrics import CUTOFFS, paired_bootstrap, pass_at_k, ranking_measures

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
    measures = ranking_measures(RANKED, TARGETS, items=12)
    for name, expected in {
        "recall@1": [1, 0, 0, 0],
        "recall@5": [1, 1, 0, 0],
        "recall@10": [1, 1, 0, 0],
        "recall@50": [1, 1, 1, 0],
        "ndcg@1": [1, 0, 0, 0],
        "ndcg@10": [1, 1 / 2, 0, 0],
        "ndcg@20": [1, 1 / 2, 1 / math.log2(12), 0],
        "mrr": [1, 1 / 3, 1 / 11, 0],
    }.items():
        np.testing.assert_allclose(measures[name], expected, err_msg=name)
    assert set(measures) == {*(f"{name}@{k}" for name in ("recall", "ndcg") for k in CUTOFFS), "mrr"}


def test_end_of_list_is_no_item() -> None:
    measures = ranking_measures(np.full((1, 12), -1), np.array([11]), items=12)
    assert all((values == 0).all() for values in measures.values())


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
        ranking_measures(ranked, TARGETS, items=12)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="user 2: the target"):
        ranking_measures(RANKED, np.array([0, 0, 12, 0]), items=12)
    with pytest.raises(ValueError, match="no users"):
        ranking_measures(RANKED[:0], TARGETS[:0], items=12)
    with pytest.raises(ValueError, match="do not go with"):
        ranking_measures(RANKED, TARGETS[:3], items=12)
    with pytest.raises(ValueError, match="integers"):
        ranking_measures(RANKED.astype(float), TARGETS, items=12)
    # A target at place 13 would be lost without notice.
    with pytest.raises(ValueError, match="12 items cannot be measured at 50"):
        ranking_measures(RANKED, TARGETS, items=100)


@given(st.data())
def test_agrees_with_the_measures_of_scikit_learn(data: st.DataObject) -> None:
    # Whole rankings, as scores; with one target the average precision of its label is its reciprocal rank.
    items = data.draw(st.integers(3, 60))
    users = data.draw(st.integers(1, 20))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ranked = np.array([generator.permutation(items) for _ in range(users)])
    targets = generator.integers(items, size=users)
    scores = np.empty((users, items))
    np.put_along_axis(scores, ranked, np.arange(items, 0, -1.0)[None, :].repeat(users, axis=0), axis=1)
    relevant = np.eye(items)[targets]
    means = {name: values.mean() for name, values in ranking_measures(ranked, targets, items=items).items()}
    for k in CUTOFFS:
        assert means[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevant, scores, k=k))
        if k < items:  # at k of all classes and more the library warns
            hits = top_k_accuracy_score(targets, scores, k=k, labels=np.arange(items))
            assert means[f"recall@{k}"] == pytest.approx(hits)
    assert means["mrr"] == pytest.approx(label_ranking_average_precision_score(relevant, scores))


@given(st.data())
def test_agrees_with_a_loop_where_lists_end_early(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 15))
    lists = data.draw(
        st.lists(st.tuples(st.permutations(range(items)), st.integers(0, items), st.integers(0, items - 1)), min_size=1)
    )
    ranked = np.array([[*order[:length], *[-1] * (items - length)] for order, length, _ in lists])
    targets = np.array([target for *_, target in lists])
    measures = ranking_measures(ranked, targets, items=items)
    places = [
        list(order[:length]).index(target) + 1 if target in order[:length] else math.inf
        for order, length, target in lists
    ]
    for k in CUTOFFS:
        np.testing.assert_allclose(measures[f"recall@{k}"], [place <= k for place in places])
        np.testing.assert_allclose(
            measures[f"ndcg@{k}"], [1 / math.log2(place + 1) if place <= k else 0 for place in places]
        )
    np.testing.assert_allclose(measures["mrr"], [1 / place for place in places])


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
