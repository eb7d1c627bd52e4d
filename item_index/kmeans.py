"""One level of k-means in float32 blocks: a k-means++ start, Lloyd's rounds, and the nearest centroid of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

# Rows whose distances to all centroids are held at once.
BLOCK_ROWS = 4096
# Rows per centroid that the start is drawn from: more of them cost time and hardly better a start.
START_ROWS_PER_CODE = 16
# Share of a cluster's total squared distance that a second centroid may be thought to save, and moves that turn out not
# to be worth it before a round gives up: they bound the search.
MOST_SAVED = 0.2
MISSES = 5
# Standard deviations off the mean that save most where the rows along the direction are about normal.
STEP_OFF_MEAN = 1.2
# Squared distances come as |r|^2 + |c|^2 - 2rc; a smaller share of |r|^2 + |c|^2 than this is rounding, not distance.
ROUNDING_SHARE = 4e-6


@dataclass(frozen=True, eq=False)
class Centroids:
    """Centroids, made ready for distances in float32.

    Everything is shifted by the centroids' mean: without that, the common part of vectors that all point one way (as
    embeddings do) would eat the digits that tell the centroids apart.

    Attributes:
        values_KD: float32, the centroids.
        shift_D: float32, their mean.
        shifted_KD: float32, `values_KD - shift_D`.
        squared_norms_K: float32, of `shifted_KD`.
    """

    values_KD: torch.Tensor
    shift_D: torch.Tensor
    shifted_KD: torch.Tensor
    squared_norms_K: torch.Tensor

    @classmethod
    def of(cls, values_KD: torch.Tensor) -> Centroids:
        shift_D = values_KD.mean(dim=0)
        shifted_KD = values_KD - shift_D
        return cls(values_KD, shift_D, shifted_KD, shifted_KD.square().sum(dim=1))

    def squared_distances(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N, K], up to rounding (which can make a zero slightly negative)."""
        shifted_ND = rows_ND - self.shift_D
        distances_NK = torch.addmm(self.squared_norms_K, shifted_ND, self.shifted_KD.T, alpha=-2.0)
        return distances_NK.add_(torch.linalg.vector_norm(shifted_ND, dim=1, keepdim=True).square_())


def nearest_codes(rows_ND: torch.Tensor, values_KD: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the nearest centroid of each row, the first of equal ones; N rows are one block.

    Rows with another centroid within rounding of the best are decided in float64, so that a row's code depends neither
    on the rows beside it nor on the device.
    """
    # A code without items may repeat another's centroid; the first of them stands for all.
    first = np.sort(np.unique(values_KD.cpu().numpy(), axis=0, return_index=True)[1])
    first_K = torch.from_numpy(first).to(values_KD.device)
    centroids = Centroids.of(values_KD[first_K])
    distances_NK = centroids.squared_distances(rows_ND)
    best_N, codes_N = distances_NK.min(dim=1)
    reach_N = torch.linalg.vector_norm(rows_ND - centroids.shift_D, dim=1) + centroids.squared_norms_K.max().sqrt()
    rounding = 4.0 * math.sqrt(rows_ND.shape[1]) * 2.0**-24
    close_NK = distances_NK <= (best_N + rounding * reach_N.square())[:, None]
    doubtful = (close_NK.sum(dim=1) > 1).nonzero()[:, 0]
    if doubtful.numel():
        row, code = close_NK[doubtful].nonzero(as_tuple=True)
        exact = torch.full((len(doubtful), len(first_K)), torch.inf, dtype=torch.float64, device=rows_ND.device)
        gap = rows_ND[doubtful[row]].double() - centroids.values_KD[code].double()
        exact[row, code] = gap.square_().sum(dim=1)
        codes_N[doubtful] = exact.argmin(dim=1)
    return first_K[codes_N]


def starting_centroids(rows_ND: torch.Tensor, codes: int, generator: np.random.Generator) -> torch.Tensor:
    """float32 [codes, D]: greedy k-means++ on a random part of the rows.

    Each centroid is the best of 2 + ln(codes) rows that are drawn in proportion to their squared distance from the
    centroids so far. Where the rows have fewer distinct values than codes, the first centroid fills the rest.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding (2007), with the greedy choice that
    its last section tells of.
    """
    if len(rows_ND) > START_ROWS_PER_CODE * codes:
        drawn = np.sort(generator.choice(len(rows_ND), START_ROWS_PER_CODE * codes, replace=False))
        rows_ND = rows_ND[torch.from_numpy(drawn).to(rows_ND.device)]
    shifted_ND = rows_ND - rows_ND.mean(dim=0)
    squared_norms_N = shifted_ND.square().sum(dim=1)

    def distances_to(candidates: torch.Tensor) -> torch.Tensor:
        norms_TN = squared_norms_N[candidates][:, None] + squared_norms_N
        distances_TN = norms_TN - 2.0 * (shifted_ND @ shifted_ND[candidates].T).T
        return distances_TN.where(distances_TN > ROUNDING_SHARE * norms_TN, 0.0)

    trials = 2 + int(math.log(codes))
    chosen = [int(generator.integers(len(rows_ND)))]
    closest_N = distances_to(torch.tensor(chosen, device=rows_ND.device))[0]
    while len(chosen) < codes:
        cumulated_N = closest_N.double().cpu().numpy().cumsum()
        if cumulated_N[-1] <= 0.0:
            chosen += [chosen[0]] * (codes - len(chosen))
            break
        drawn = np.searchsorted(cumulated_N, generator.random(trials) * cumulated_N[-1], side="right")
        candidates = torch.from_numpy(drawn.clip(max=len(rows_ND) - 1)).to(rows_ND.device)
        closer_TN = torch.minimum(closest_N, distances_to(candidates))
        best = int(closer_TN.sum(dim=1, dtype=torch.float64).argmin())
        chosen.append(int(candidates[best]))
        closest_N = closer_TN[best]
    return rows_ND[torch.tensor(chosen, device=rows_ND.device)]


def add_cluster_sums(sums_KD: torch.Tensor, rows_ND: torch.Tensor, codes_N: torch.Tensor) -> None:
    """Add the rows of each code to float64 [K, D] sums, in one order on every run.

    In float64 the mean of equal float32 rows is that very row, so items that are the same leave no residual.
    """
    if rows_ND.device.type == "cpu":
        sums_KD.index_add_(0, codes_N, rows_ND.double())
    else:  # there index_add_ sums in the order in which threads happen to come
        members_NK = torch.nn.functional.one_hot(codes_N, len(sums_KD)).double()
        sums_KD.addmm_(members_NK.T, rows_ND.double())


def cluster_means(rows_ND: torch.Tensor, codes_N: torch.Tensor, values_KD: torch.Tensor) -> torch.Tensor:
    """float32 [K, D]: the mean row of each code; a code without rows keeps its centroid in `values_KD`."""
    sums_KD = torch.zeros(values_KD.shape, dtype=torch.float64, device=values_KD.device)
    for rows_BD, codes_B in zip(rows_ND.split(BLOCK_ROWS), codes_N.split(BLOCK_ROWS), strict=True):
        add_cluster_sums(sums_KD, rows_BD, codes_B)
    sizes_K = torch.bincount(codes_N, minlength=len(values_KD))
    return torch.where(sizes_K[:, None] > 0, sums_KD / sizes_K[:, None], values_KD.double()).float()


def fit_plain(rows_ND: torch.Tensor, start_KD: torch.Tensor, rounds: int) -> torch.Tensor:
    """float32 [K, D] centroids after Lloyd's rounds from `start_KD`; fewer rounds where nothing moves any more.

    Between rounds, centroids without rows and those of little use go to clusters that have more use for a second one
    (see `move_idle_centroids`). The mean squared distance to the nearest centroid never rises from round to round.
    """
    values_KD = start_KD
    before_N: torch.Tensor | None = None
    for _ in range(rounds):
        centroids = Centroids.of(values_KD)
        nearest = [centroids.squared_distances(block).min(dim=1) for block in rows_ND.split(BLOCK_ROWS)]
        codes_N = torch.cat([block.indices for block in nearest])
        distances_N = torch.cat([block.values for block in nearest])
        values_KD = cluster_means(rows_ND, codes_N, values_KD)
        moved = move_idle_centroids(rows_ND, codes_N, distances_N, values_KD)
        if before_N is not None and not moved and torch.equal(codes_N, before_N):
            break
        before_N = codes_N
    return values_KD


def move_idle_centroids(
    rows_ND: torch.Tensor, codes_N: torch.Tensor, distances_N: torch.Tensor, values_KD: torch.Tensor
) -> int:
    """Move centroids to where they are sure to lower the total squared distance; returns how many were moved.

    In many dimensions a centroid that started on an odd row often keeps that row alone, while a few clusters have all
    the others; Lloyd's rounds do not leave that state. Without its centroid, a cluster of n rows costs at most n times
    the squared distance from there to the next centroid. A second centroid in another cluster, a step s off its mean
    along its main direction, saves max(0, 2 s t - s^2) on each row that lies at t in that direction. The centroids of
    least cost are offered to the clusters of largest total distance.

    Args:
        rows_ND: float32.
        codes_N: int64, the cluster of each row.
        distances_N: float32, squared distance of each row from its centroid. They only say where to look.
        values_KD: float32, the means of the clusters (anything where a cluster is empty); changed in place.
    """
    codes = len(values_KD)
    sizes_K = torch.bincount(codes_N, minlength=codes)
    totals_K = torch.zeros(codes, dtype=torch.float64)
    totals_K.index_add_(0, codes_N.cpu(), distances_N.double().cpu())  # there the order of the sums is fixed
    gaps_KK = torch.cdist(values_KD.double(), values_KD.double()).square_().fill_diagonal_(torch.inf)
    gap_K, next_K = gaps_KK.min(dim=1)
    cost_K = torch.where(sizes_K > 0, gap_K * sizes_K, 0.0).cpu()
    costs, totals, following = cost_K.tolist(), totals_K.tolist(), next_K.tolist()
    moved: set[int] = set()
    needed: set[int] = set()  # clusters whose centroid has to stay: rows of a moved one fall to it, or it got a second
    misses = 0
    for giver, taker in zip(
        torch.argsort(cost_K, stable=True).tolist(),
        torch.argsort(totals_K, descending=True, stable=True).tolist(),
        strict=True,
    ):
        if costs[giver] >= MOST_SAVED * totals[taker] or misses == MISSES:
            break
        if giver == taker or giver in needed or taker in moved or following[giver] in moved:
            continue
        members_MD = rows_ND[codes_N == taker] - values_KD[taker]
        direction_D = members_MD[members_MD.square().sum(dim=1).argmax()]
        for _ in range(2):  # of the power method: near the main direction is near enough
            direction_D = members_MD.T @ (members_MD @ direction_D)
            direction_D = direction_D / direction_D.norm().clamp(min=1e-30)
        along_M = members_MD @ direction_D
        step = STEP_OFF_MEAN * float(along_M.square().mean().sqrt())
        saved = float((2.0 * step * along_M - step**2).clamp(min=0.0).sum(dtype=torch.float64))
        if saved > costs[giver]:
            values_KD[giver] = values_KD[taker] + step * direction_D
            moved.add(giver)
            needed |= {taker, following[giver]}
        else:
            misses += 1
    return len(moved)
