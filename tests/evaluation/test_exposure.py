from __future__ import annotations

import math
from collections import Counter
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.exposure import exposure_metrics
from item_index.ragged import RaggedArray


def histories(*rows: list[int]) -> RaggedArray:
    return RaggedArray.of(rows, np.int64)


def test_hand_vectors() -> None:
    interactions = np.array([10, 20, 30, 40])
    even = exposure_metrics(np.array([[0, 1], [2, 3]]), histories([0], [1]), interactions)
    assert even["coverage@10"] == 1
    assert even["entropy@10"] == pytest.approx(1)
    assert even["popularity_lift@10"] == pytest.approx((15 + 35) / (10 + 20) - 1)
    alike = exposure_metrics(np.array([[3, -1], [3, -1]]), histories([3], [3, 3]), interactions)
    assert alike == {"coverage@10": 0.25, "entropy@10": 0.0, "popularity_lift@10": 0.0}


def test_only_the_first_ten_places_count() -> None:
    ranked = np.arange(12)[None, :]
    metrics = exposure_metrics(ranked, histories([0]), np.arange(1, 13))
    assert metrics["coverage@10"] == pytest.approx(10 / 12)
    assert metrics["entropy@10"] == pytest.approx(math.log(10) / math.log(12))


def test_users_without_list_or_history_have_no_lift() -> None:
    interactions = np.array([10, 20])
    ranked = np.array([[0, 1], [-1, -1], [1, -1]])
    metrics = exposure_metrics(ranked, histories([], [1], [0]), interactions)
    assert metrics["popularity_lift@10"] == pytest.approx(20 / 10 - 1)  # the third alone
    assert "popularity_lift@10" not in exposure_metrics(ranked[:2], histories([], [1]), interactions)
    assert exposure_metrics(ranked[1:2], histories([1]), interactions)["entropy@10"] == 0


@given(st.data())
def test_agrees_with_a_loop(data: st.DataObject) -> None:
    items = data.draw(st.integers(2, 15))
    order = st.permutations(range(items))
    users = data.draw(
        st.lists(st.tuples(order, st.integers(1, items), st.lists(st.integers(0, items - 1), min_size=1)), min_size=1)
    )
    interactions = np.array(data.draw(st.lists(st.integers(1, 50), min_size=items, max_size=items)))
    lists = [ranked[: min(length, 10)] for ranked, length, _ in users]
    ranked = np.array([[*places[:length], *[-1] * (items - length)] for places, length, _ in users])
    metrics = exposure_metrics(ranked, histories(*(history for *_, history in users)), interactions)
    counts = Counter(item for row in lists for item in row)
    total = sum(counts.values())
    assert metrics["coverage@10"] == pytest.approx(len(counts) / items)
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert metrics["entropy@10"] == pytest.approx(entropy / math.log(items), abs=1e-9)
    shown = mean(mean(float(interactions[item]) for item in row) for row in lists)
    before = mean(mean(float(interactions[item]) for item in history) for *_, history in users)
    assert metrics["popularity_lift@10"] == pytest.approx(shown / before - 1, abs=1e-9)
