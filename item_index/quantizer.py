"""Vectors to codes: residual k-means (RQ-KMeans of GREAM), with plain or balanced clusters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from item_index.input_error import InputError

KMEANS_STARTS = 4
BALANCED_ROUNDS = 20
# Items whose distances to all centroids are held at once by `encode`.
ENCODE_BLOCK = 8192


@dataclass(frozen=True)
class LevelSummary:
    """How one level fits the vectors it was fitted on.

    Attributes:
        codes: size of the level.
        codes_used: codes that hold at least one item.
        largest_cluster: items in the fullest code.
        mean_squared_residual: mean over items of the squared norm that is left after this level.
    """

    codes: int
    codes_used: int
    largest_cluster: int
    mean_squared_residual: float


@dataclass(frozen=True, eq=False)
class ResidualKMeans:
    """H codebooks; each level quantizes what the levels before it have left over.

    Attributes:
        codebooks: per level, float32 [K_l, D].
        training_codes_IH: int32 [items, H], codes of the vectors it was fitted on. With plain clusters these are what
            `encode` gives; with balanced ones an item may sit in a centroid that is not its nearest.
        summaries: one per level.
    """

    codebooks: tuple[np.ndarray, ...]
    training_codes_IH: np.ndarray
    summaries: tuple[LevelSummary, ...]

    @classmethod
    def fit(
        cls, vectors_ID: np.ndarray, level_sizes: Sequence[int], *, seed: int, balanced: bool = False
    ) -> ResidualKMeans:
        """Fit one k-means per level on the residuals: R(1) = e, R(l+1) = R(l) - c(l)[s(l)].

        Args:
            vectors_ID: float [items, D].
            level_sizes: codes K_l of each level.
            seed: the same vectors and seed give the same codes in every process.
            balanced: every code of a level gets either the floor or the ceiling of items / K_l items.

        Raises InputError for no levels, a level without codes, fewer items than codes, or vectors that are not finite.
        """
        if not level_sizes or min(level_sizes) < 1:
            raise InputError(
                f"level sizes are {list(level_sizes)}",
                field="level_sizes",
                remedy="Give one positive size per level, for example [256, 256, 256, 256].",
            )
        items = len(vectors_ID)
        for level, size in enumerate(level_sizes):
            if items < size:
                raise InputError(
                    f"fewer items than codes: level {level + 1} has {size} codes, but there are {items} items",
                    field="level_sizes",
                    remedy=f"Lower the level's size to {items} or less, or give more items.",
                )
        residuals = _finite(vectors_ID)
        codebooks, columns, summaries = [], [], []
        for level, size in enumerate(level_sizes):
            codebook = _kmeans(residuals, size, seed + level)
            codes = _nearest(residuals, codebook)
            if balanced:
                codebook, codes = _balance(residuals, codebook, codes)
            residuals = residuals - codebook[codes]
            sizes = np.bincount(codes, minlength=size)
            codebooks.append(codebook)
            columns.append(codes)
            summaries.append(
                LevelSummary(
                    codes=size,
                    codes_used=int(np.count_nonzero(sizes)),
                    largest_cluster=int(sizes.max()),
                    mean_squared_residual=float((residuals**2).sum(axis=1).mean()),
                )
            )
        return cls(tuple(codebooks), np.stack(columns, axis=1).astype(np.int32), tuple(summaries))

    def encode(self, vectors_ID: np.ndarray) -> np.ndarray:
        """int32 [items, H]: the nearest centroid level by level, for items old and new."""
        residuals = _finite(vectors_ID)
        columns = []
        for codebook in self.codebooks:
            codes = _nearest(residuals, codebook)
            residuals = residuals - codebook[codes]
            columns.append(codes)
        return np.stack(columns, axis=1).astype(np.int32)


def _finite(vectors_ID: np.ndarray) -> np.ndarray:
    """float64 [items, D], so that residuals of residuals keep their digits."""
    vectors = np.asarray(vectors_ID, dtype=np.float64)
    bad = np.nonzero(~np.isfinite(vectors).all(axis=1))[0]
    if bad.size:
        raise InputError(
            f"the vector of item row {bad[0]} holds a value that is not finite",
            field="vectors",
            remedy="Check the encoder's output.",
        )
    return vectors


def _kmeans(residuals: np.ndarray, size: int, seed: int) -> np.ndarray:
    """float32 [size, D] centroids. One thread sums in one order, so the result never varies with the load."""
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer distinct residuals than codes leave codes without items, which the summary reports.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(size, n_init=KMEANS_STARTS, algorithm="lloyd", random_state=seed).fit(residuals)
    return fitted.cluster_centers_.astype(np.float32)


def _squared_distances(residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """float64 [items, K], less each item's own squared norm, which ranks nothing."""
    centroids = codebook.astype(np.float64)
    return (centroids**2).sum(axis=1) - 2.0 * residuals @ centroids.T


def _nearest(residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    blocks = [
        _squared_distances(residuals[start : start + ENCODE_BLOCK], codebook).argmin(axis=1)
        for start in range(0, len(residuals), ENCODE_BLOCK)
    ]
    return np.concatenate(blocks)


def _balance(residuals: np.ndarray, codebook: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's rounds with the best balanced assignment instead of the nearest centroid, until nothing moves."""
    for _ in range(BALANCED_ROUNDS):
        fresh = balanced_assignment(_squared_distances(residuals, codebook))
        sums = np.zeros((len(codebook), residuals.shape[1]))
        np.add.at(sums, fresh, residuals)
        codebook = (sums / np.bincount(fresh, minlength=len(codebook))[:, None]).astype(np.float32)
        if np.array_equal(fresh, codes):
            break
        codes = fresh
    return codebook, codes


def balanced_assignment(costs_IK: np.ndarray) -> np.ndarray:
    """int64 [items]: the cheapest assignment in which every cluster gets the floor or ceiling of items / K items.

    A minimum-cost flow by successive shortest paths. Every cluster first takes items whose cheapest it is, up to the
    floor. The others come in one by one, each along the cheapest chain of moves (it enters a cluster, which hands an
    item on to another, and so on) that ends in a cluster with room. Chains run over K clusters, so no matrix of items
    by places is needed. Exact for any finite costs, given at least K items.
    """
    items, clusters = costs_IK.shape
    floor, ceiling = items // clusters, -(-items // clusters)
    # Filling every cluster to the floor outweighs any chain; a cluster at the ceiling takes nothing more.
    must_fill = -4.0 * clusters * (1.0 + float(np.ptp(costs_IK)))
    cheapest_cluster = costs_IK.argmin(axis=1)
    assigned = np.full(items, -1, dtype=np.int64)
    for cluster in range(clusters):
        assigned[np.nonzero(cheapest_cluster == cluster)[0][:floor]] = cluster
    sizes = np.bincount(assigned[assigned >= 0], minlength=clusters)
    every = np.arange(clusters)
    move_cost = np.full((clusters, clusters), np.inf)  # of the cheapest item that cluster a could hand on to b
    mover = np.full((clusters, clusters), -1, dtype=np.int64)

    def refresh(cluster: int) -> None:
        members = np.nonzero(assigned == cluster)[0]
        if members.size == 0:
            return
        changes = costs_IK[members] - costs_IK[members, cluster][:, None]
        cheapest = changes.argmin(axis=0)
        move_cost[cluster] = changes[cheapest, every]
        mover[cluster] = members[cheapest]

    for cluster in range(clusters):
        refresh(cluster)
    for item in np.nonzero(assigned < 0)[0]:
        distance = costs_IK[item].copy()
        before = np.full(clusters, -1, dtype=np.int64)
        for _ in range(clusters):  # Bellman-Ford; a chain visits each cluster at most once
            through = distance[:, None] + move_cost
            best = through.argmin(axis=0)
            shorter = through[best, every] < distance - 1e-12 * (1.0 + np.abs(distance))
            if not shorter.any():
                break
            distance[shorter] = through[best, every][shorter]
            before[shorter] = best[shorter]
        room = np.where(sizes < floor, must_fill, np.where(sizes < ceiling, 0.0, np.inf))
        cluster = int((distance + room).argmin())
        sizes[cluster] += 1
        touched = [cluster]
        while before[cluster] >= 0:
            source = int(before[cluster])
            assigned[mover[source, cluster]] = cluster
            cluster = source
            touched.append(cluster)
        assigned[item] = cluster
        for changed in touched:
            refresh(changed)
    return assigned
