"""Measures of ranked lists with one target a user, and the uncertainty of their differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUTOFFS = (1, 5, 10, 20, 50)


def ranking_measures(
    ranked_UK: np.ndarray, targets_U: np.ndarray, *, items: int, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, np.ndarray]:
    """Measures of each user's list, float64 [users]: `recall@k` and `ndcg@k` for each cutoff, and `mrr`.

    With one target at place p of a list (from 1), recall@k is 1 for p <= k (and equals the hit rate), ndcg@k is
    1 / log2(p + 1) for p <= k, the reciprocal rank `mrr` is 1 / p, and all are 0 where the list lacks the target: `mrr`
    is cut at K as well. Their means over users are the metrics of these names.

    Args:
        ranked_UK: integers [users, K], item rows from best to worst, -1 after the end of a shorter list.
        targets_U: integers [users], item rows.
        items: size of the catalogue.
        cutoffs: places k, at most K unless K lists the whole catalogue.

    Raises:
        ValueError: no users, shapes that do not fit, rows outside the catalogue, an item after a list's end, a repeated
            item, or lists too short for a cutoff; the message names the user's place.
    """
    ranked_UK, targets_U = np.asarray(ranked_UK), np.asarray(targets_U)
    _check_lists(ranked_UK, targets_U, items)
    if min(cutoffs) < 1:
        raise ValueError("cutoffs start at 1")
    if ranked_UK.shape[1] < min(max(cutoffs), items):
        raise ValueError(f"lists of {ranked_UK.shape[1]} items cannot be measured at {max(cutoffs)}; rank more items")

    hit_UK = ranked_UK == targets_U[:, None]
    return place_measures(np.where(hit_UK.any(axis=1), hit_UK.argmax(axis=1) + 1.0, np.inf), cutoffs)


def place_measures(place_U: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """`ranking_measures` of targets at these places of their lists, from 1; infinity where a list lacks its target."""
    measures = {f"recall@{k}": (place_U <= k).astype(np.float64) for k in cutoffs}
    for k in cutoffs:
        measures[f"ndcg@{k}"] = np.where(place_U <= k, 1 / np.log2(place_U + 1), 0.0)
    return {**measures, "mrr": 1 / place_U}


def _check_lists(ranked_UK: np.ndarray, targets_U: np.ndarray, items: int) -> None:
    if ranked_UK.ndim != 2 or targets_U.shape != ranked_UK.shape[:1]:
        raise ValueError(f"lists of shape {ranked_UK.shape} do not go with targets of shape {targets_U.shape}")
    if len(targets_U) == 0:
        raise ValueError("there are no users to measure")
    if not (np.issubdtype(ranked_UK.dtype, np.integer) and np.issubdtype(targets_U.dtype, np.integer)):
        raise ValueError(f"item rows are integers, not {ranked_UK.dtype} and {targets_U.dtype}")
    ended_UK = ranked_UK == -1
    sorted_UK = np.sort(ranked_UK, axis=1)
    repeated_UK = (sorted_UK[:, 1:] == sorted_UK[:, :-1]) & (sorted_UK[:, 1:] >= 0)
    problems = {
        f"the target is not a row of the {items} items": (targets_U < 0) | (targets_U >= items),
        f"the list has an entry outside -1 to {items - 1}": ((ranked_UK < -1) | (ranked_UK >= items)).any(axis=1),
        "the list goes on after its end (-1)": (ended_UK[:, :-1] & ~ended_UK[:, 1:]).any(axis=1),
        "an item is repeated in the list": repeated_UK.any(axis=1),
    }
    for problem, wrong_U in problems.items():
        if wrong_U.any():
            raise ValueError(f"user {int(np.argmax(wrong_U))}: {problem}")


def pass_at_k(hits_UN: np.ndarray, k: int) -> float:
    """Pass@k, the chance that k of a user's n responses hold a hit: mean over users of 1 - C(n - c, k) / C(n, k).

    The estimator is unbiased (arXiv 2107.03374). `hits_UN` is bool [users, n] with c hits in a user's row. Raises
    ValueError for k outside 1 to n and where there are no users.
    """
    hits_UN = np.asarray(hits_UN)
    if hits_UN.ndim != 2 or hits_UN.dtype != bool or len(hits_UN) == 0:
        raise ValueError(f"hits must be bool [users, n] with users, got {hits_UN.dtype} {hits_UN.shape}")
    n = hits_UN.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} responses or more of each user (and k >= 1), there are {n}")
    misses_U = n - hits_UN.sum(axis=1)
    # C(m, k) / C(n, k) as a product of k ratios below 1, which cannot overflow; a factor is 0 for m < k.
    ratios_Uk = np.maximum(misses_U[:, None] - np.arange(k), 0) / (n - np.arange(k))
    return float(np.mean(1 - ratios_Uk.prod(axis=1)))


def paired_bootstrap(a_U: np.ndarray, b_U: np.ndarray, *, samples: int = 2000, seed: int) -> tuple[float, float, float]:
    """Mean of b - a over users and its 95 % percentile interval: (mean difference, low, high).

    `a_U` and `b_U` [users] hold one measure of the same users under two systems. Users are drawn with replacement
    `samples` times. Raises ValueError for shapes that do not fit, no users, and no samples.
    """
    a_U, b_U = np.asarray(a_U, dtype=np.float64), np.asarray(b_U, dtype=np.float64)
    if a_U.ndim != 1 or a_U.shape != b_U.shape or len(a_U) == 0:
        raise ValueError(f"one measure of the same users is needed twice, got shapes {a_U.shape} and {b_U.shape}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    difference_U = b_U - a_U
    generator = np.random.default_rng(seed)
    users = len(difference_U)
    means = [difference_U[generator.integers(users, size=users)].mean() for _ in range(samples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference_U.mean()), float(low), float(high)
