from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from scipy.optimize import linear_sum_assignment

from item_index.balanced_assignment import balanced_codes, fit_balanced
from item_index.kmeans import cluster_means, starting_centroids


def assigned(costs_IK: np.ndarray) -> np.ndarray:
    costs = torch.from_numpy(costs_IK.astype(np.float32))
    return balanced_codes(lambda rows: costs[rows], *costs_IK.shape).numpy()


def cheapest_balanced_cost(costs_IK: np.ndarray) -> float:
    """By the assignment problem: one column per place, and stand-ins that may take only a cluster's last place."""
    items, clusters = costs_IK.shape
    places = -(-items // clusters)
    stand_in = np.where(np.tile(np.arange(places), clusters) == places - 1, 0.0, 1e6)
    square = np.concatenate(
        [np.repeat(costs_IK, places, axis=1), np.tile(stand_in, (clusters * places - items, 1))], axis=0
    )
    return float(square[linear_sum_assignment(square)].sum())


def squared_distances(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((rows[:, None] - centroids) ** 2).sum(axis=2)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_sizes_are_within_one_for_any_costs(data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, 6))
    items = data.draw(st.integers(clusters, 30))
    element = st.floats(0, 1000, width=32)
    codes = assigned(data.draw(hypothesis_numpy.arrays(np.float32, (items, clusters), elements=element)))
    sizes = np.bincount(codes, minlength=clusters)
    assert len(codes) == items
    assert sizes.min() == items // clusters
    assert sizes.max() == -(-items // clusters)


@pytest.mark.parametrize("items", [320, 333, 350])
@pytest.mark.parametrize("seed", range(4))
def test_the_total_is_within_two_percent_of_the_cheapest(items: int, seed: int) -> None:
    """Clusters of very uneven size, so that many rows have to leave their nearest centroid."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(16, 6)) * 2
    popularity = 1.0 / np.arange(1, 17)
    rows = centres[generator.choice(16, size=items, p=popularity / popularity.sum())] + generator.normal(
        size=(items, 6)
    )
    costs = squared_distances(rows, centres)
    codes = assigned(costs)
    total, cheapest = costs[np.arange(items), codes].sum(), cheapest_balanced_cost(costs)
    assert costs.min(axis=1).sum() < 0.9 * cheapest  # balance is not for nothing here
    assert cheapest * (1 - 1e-6) <= total <= 1.02 * cheapest


def test_rows_whose_candidates_are_all_full_look_at_every_cluster() -> None:
    """All rows rank 40 clusters alike, so the last clusters are among the nearest of none."""
    costs = np.tile(np.arange(40.0), (80, 1))
    assert np.bincount(assigned(costs), minlength=40).tolist() == [2] * 40


def test_prices_to_start_from_do_not_change_the_sizes() -> None:
    costs = torch.rand((100, 7), generator=torch.Generator().manual_seed(0))
    prices = torch.linspace(-1, 1, 7, dtype=torch.float64)
    sizes = torch.bincount(balanced_codes(lambda rows: costs[rows], 100, 7, prices), minlength=7)
    assert sorted(sizes.tolist()) == [14] * 5 + [15] * 2


def test_balanced_rounds_come_close_to_lloyds_rounds_with_the_cheapest_assignment() -> None:
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(6, 4)) * 4
    rows = (centres[generator.integers(6, size=192)] + generator.normal(size=(192, 4))).astype(np.float32)
    start = starting_centroids(torch.from_numpy(rows), 8, np.random.default_rng(0))
    slow = start.numpy().astype(np.float64)
    for _ in range(12):
        places = np.repeat(squared_distances(rows, slow), 24, axis=1)
        slow_codes = linear_sum_assignment(places)[1] // 24
        slow = np.stack([rows[slow_codes == code].mean(axis=0) for code in range(8)])
    centroids, prices = fit_balanced(torch.from_numpy(rows), start, 12)
    distances = torch.from_numpy(squared_distances(rows, centroids.numpy()).astype(np.float32))
    codes = balanced_codes(lambda some: distances[some], 192, 8, prices)
    means = cluster_means(torch.from_numpy(rows), codes, centroids).numpy()
    error = ((rows - means[codes.numpy()]) ** 2).sum()
    assert error <= 1.1 * ((rows - slow[slow_codes]) ** 2).sum()
