"""One level of k-means in float32 blocks: a k-means++ start, Lloyd's rounds, and the nearest centroid of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

# Rows whose distances to all centroids are held at once.
BLOCK_ROWS = 4096
# Rows per centroid that the start is drawn from: more of them cost time and hardly better a start.
START_ROWS_PER_CODE = 32
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

    The mean squared distance to the nearest centroid never rises from one round to the next. A code that has lost all
    its rows starts again at the row that is farthest from its centroid, unless every row sits on its centroid.
    """
    values_KD = start_KD
    before_N: torch.Tensor | None = None
    for _ in range(rounds):
        centroids = Centroids.of(values_KD)
        codes_N = torch.cat([centroids.squared_distances(block).argmin(dim=1) for block in rows_ND.split(BLOCK_ROWS)])
        values_KD = cluster_means(rows_ND, codes_N, values_KD)
        empty = (torch.bincount(codes_N, minlength=len(values_KD)) == 0).nonzero()[:, 0]
        if empty.numel():
            blocks = zip(rows_ND.split(BLOCK_ROWS), codes_N.split(BLOCK_ROWS), strict=True)
            distances_N = torch.cat([(rows - values_KD[codes]).square_().sum(dim=1) for rows, codes in blocks])
            farthest = distances_N.topk(min(len(empty), len(rows_ND)))
            moved = farthest.indices[farthest.values > 0.0]
            values_KD[empty[: len(moved)]] = rows_ND[moved]
            empty = moved
        if before_N is not None and not empty.numel() and torch.equal(codes_N, before_N):
            break
        before_N = codes_N
    return values_KD
