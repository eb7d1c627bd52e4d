"""Clusters of equal size: every cluster has a price, and rows go where distance plus price is least.

The cheapest assignment to clusters of fixed sizes is a transport problem with one sink per cluster. Its dual has one
price per cluster. Smoothed by an entropy at some temperature (a row then shares itself out between the clusters that
are about as cheap), the dual has a gradient, the sizes that the prices lead to less the even ones, and a Hessian, and
is climbed by Newton's steps while the temperature falls. The hundredth of the rows or so that is out of balance at the
end is moved where it costs least.

Source: Cuturi, Sinkhorn distances (2013), for the smoothed problem; the rest is textbook optimisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from item_index.kmeans import BLOCK_ROWS, Centroids, cluster_means

# Final temperature as a share of the mean squared distance to the nearest centroid: rows share themselves out between
# clusters that differ by less. Far below the 2 % that a total may be off.
TEMPERATURE_SHARE = 0.02
# Prices that are found from nothing start at this share of the mean gap between a row's farthest and nearest cluster
# and follow the temperature down by halves, two steps each: Newton's steps from far away overshoot at the final one.
FIRST_TEMPERATURE_SHARE = 0.1
# Multiples of the final temperature for prices of the round before, whose centroids have moved since.
ROUND_COOLING = (4.0, 2.0, 1.0)
# With more than this share of the rows out of balance after that, prices are found from nothing after all.
LOST_IMBALANCE = 0.2
# No price moves by more temperatures in one step.
LONGEST_STEP = 4.0
# Rows per cluster that the Hessian is taken from; it steers the step, so a part of the rows is enough.
HESSIAN_ROWS_PER_CODE = 16
# Added to the Hessian's diagonal, as a share of the even size: for clusters that no row wants, and for a common shift
# of all prices, which changes nothing.
RIDGE_SHARE = 0.03
# Clusters that the repair looks at for each row, by distance plus price, before it looks at all of them.
CANDIDATES = 16
# Looks for rows that two clusters would better exchange, at most; most are found by the first.
SWAP_SWEEPS = 20


@dataclass(frozen=True, eq=False)
class PricedSizes:
    """What prices lead to at a temperature.

    Attributes:
        prices_K: float64.
        temperature: of the shares.
        sizes_K: float64, rows of each cluster, rows being shared out.
        overlap_KK: float64, sum over rows of the products of their shares; the Hessian is made of it.
        codes_N: int64, the cheapest cluster of each row, by distance plus price; None where it was not asked for.
    """

    prices_K: torch.Tensor
    temperature: float
    sizes_K: torch.Tensor
    overlap_KK: torch.Tensor
    codes_N: torch.Tensor | None

    @classmethod
    def at(
        cls, prices_K: torch.Tensor, temperature: float, blocks: Iterable[torch.Tensor], items: int, *, assign: bool
    ) -> PricedSizes:
        """Blocks are the rows' squared distances to all clusters, float32 [rows of a block, K]."""
        codes = len(prices_K)
        stride = max(1, items // (HESSIAN_ROWS_PER_CODE * codes))
        sizes_K = torch.zeros(codes, dtype=torch.float64, device=prices_K.device)
        overlap_KK = torch.zeros((codes, codes), dtype=torch.float64, device=prices_K.device)
        best, overlap_rows = [], 0
        for distances_BK in blocks:
            scaled_BK = torch.add(prices_K.float() / -temperature, distances_BK, alpha=-1.0 / temperature)
            if assign:
                best.append(scaled_BK.argmax(dim=1))
            shares_BK = scaled_BK.softmax(dim=1)
            sizes_K += shares_BK.sum(dim=0)
            part_BK = shares_BK[::stride]
            overlap_KK += part_BK.T @ part_BK
            overlap_rows += len(part_BK)
        codes_N = torch.cat(best) if assign else None
        return cls(prices_K, temperature, sizes_K, overlap_KK * (items / overlap_rows), codes_N)

    def next_prices(self) -> torch.Tensor:
        """float64 [K]: one of Newton's steps on, with a mean of zero."""
        even = self.sizes_K.mean()
        # The overlap's row sums would be the sizes if it came from all rows; taken from the same part of the rows, they
        # keep the matrix a graph's Laplacian.
        laplacian_KK = torch.diag(self.overlap_KK.sum(dim=1)) - self.overlap_KK
        laplacian_KK.diagonal().add_(RIDGE_SHARE * even)
        step_K = self.temperature * torch.linalg.solve(laplacian_KK, self.sizes_K - even)
        bound = LONGEST_STEP * self.temperature
        prices_K = self.prices_K + step_K.clamp(-bound, bound)
        return prices_K - prices_K.mean()


def cooling_path(blocks: Iterable[torch.Tensor], items: int) -> list[float]:
    """Falling temperatures for rows with these distances, the last one the final one, all positive."""
    nearest, spread = 0.0, 0.0
    for distances_BK in blocks:
        nearest_B, farthest_B = torch.aminmax(distances_BK, dim=1)
        nearest += float(nearest_B.sum(dtype=torch.float64))
        spread += float((farthest_B - nearest_B).sum(dtype=torch.float64))
    # Rows that all sit on a centroid have no distance to measure by; where nothing differs at all, anything will do.
    final = max(TEMPERATURE_SHARE * nearest / items, 1e-4 * spread / items, 1e-30)
    halvings = max(0, math.ceil(math.log2(max(FIRST_TEMPERATURE_SHARE * spread / items, final) / final)))
    return [final * 2.0**power for power in range(halvings, -1, -1) for _ in range(2)] + [final]


def even_prices(
    prices_K: torch.Tensor | None, blocks: Callable[[], Iterable[torch.Tensor]], items: int, codes: int
) -> PricedSizes:
    """Prices for nearly even clusters, at the final temperature.

    Args:
        prices_K: float64, prices of nearly the same distances to start from; None to find them from nothing.
        blocks: gives the distances to all clusters, float32 [rows of a block, codes], block by block.

    What comes back has the rows' codes.
    """
    path = cooling_path(blocks(), items)
    if prices_K is not None:
        for multiple in ROUND_COOLING:
            reached = PricedSizes.at(prices_K, multiple * path[-1], blocks(), items, assign=multiple == 1.0)
            prices_K = reached.next_prices()
        if float((reached.sizes_K - items / codes).abs().sum()) / (2 * items) <= LOST_IMBALANCE:
            return reached
    else:
        prices_K = torch.zeros(codes, dtype=torch.float64, device=next(iter(blocks())).device)
    for step, temperature in enumerate(path, start=1):
        reached = PricedSizes.at(prices_K, temperature, blocks(), items, assign=step == len(path))
        prices_K = reached.next_prices()
    return reached


def fit_balanced(rows_ND: torch.Tensor, start_KD: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's rounds with prices that keep the clusters even, nearly.

    Returns the centroids, float32 [K, D], and prices for them, float64 [K]. The distances of all these rows to all
    centroids are held in memory.
    """
    values_KD = start_KD
    prices_K: torch.Tensor | None = None
    before_N: torch.Tensor | None = None
    for _ in range(rounds):
        centroids = Centroids.of(values_KD)
        held = [centroids.squared_distances(block) for block in rows_ND.split(BLOCK_ROWS)]
        reached = even_prices(prices_K, partial(iter, held), len(rows_ND), len(start_KD))
        prices_K = reached.next_prices()
        assert reached.codes_N is not None
        values_KD = cluster_means(rows_ND, reached.codes_N, values_KD)
        if before_N is not None and torch.equal(reached.codes_N, before_N):
            break
        before_N = reached.codes_N
    return values_KD, reached.next_prices()


def balanced_codes(
    distances_of: Callable[[torch.Tensor], torch.Tensor], items: int, codes: int, prices_K: torch.Tensor | None = None
) -> torch.Tensor:
    """int64 [items]: a cluster for every row, each cluster with the floor or ceiling of items / codes rows.

    Args:
        distances_of: squared distances of some rows (int64, ascending, on the CPU) to all clusters, float32 [rows, K].
            It is asked for a block of rows at a time.
        items: number of rows, at least `codes`.
        codes: number of clusters K.
        prices_K: float64, good prices to start from; None to find them.

    The total is near the cheapest one (the tests hold 2 %), not always the cheapest.
    """
    row_blocks = torch.arange(items).split(BLOCK_ROWS)

    def blocks() -> Iterable[torch.Tensor]:
        return (distances_of(rows) for rows in row_blocks)

    prices_K = even_prices(prices_K, blocks, items, codes).next_prices()
    device = prices_K.device
    kept = min(CANDIDATES, codes)
    costs_NC = torch.empty((items, kept), device=device)
    clusters_NC = torch.empty((items, kept), dtype=torch.int32, device=device)
    for rows, costs_BC, clusters_BC in zip(
        row_blocks, costs_NC.split(BLOCK_ROWS), clusters_NC.split(BLOCK_ROWS), strict=True
    ):
        cheapest = (distances_of(rows) + prices_K.float()).topk(kept, dim=1, largest=False)
        costs_BC.copy_(cheapest.values)
        clusters_BC.copy_(cheapest.indices)
    # The rows that are left over when all clusters have the floor go to the dearest clusters, which more rows want.
    wanted_K = torch.full((codes,), items // codes, device=device)
    wanted_K[torch.argsort(prices_K, descending=True, stable=True)[: items % codes]] += 1
    codes_N, paid_N = repaired(costs_NC, clusters_NC, wanted_K, lambda rows: distances_of(rows) + prices_K.float())
    for _ in range(SWAP_SWEEPS):
        if not swap_rows(codes_N, paid_N, costs_NC, clusters_NC, codes):
            break
    return codes_N


def repaired(
    costs_NC: torch.Tensor,
    clusters_NC: torch.Tensor,
    wanted_K: torch.Tensor,
    costs_of: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's cheapest candidate, but overfull clusters hand rows on: clusters, int64 [N]; costs, float32 [N].

    In turns, every row of an overfull cluster names the cheapest cluster with room; the cluster lets go those that lose
    least by it, as many as are too many; and a cluster with room takes those that lose least, as many as it has room
    for. Each turn moves a row at least. Rows look at their candidates; where none of those has room, at all clusters.

    Args:
        costs_NC: costs of each row's candidate clusters, ascending.
        clusters_NC: int32, those clusters.
        wanted_K: int64, rows that each cluster is to have, N in all.
        costs_of: costs of given rows at all clusters, float32 [rows, K].
    """
    codes_N = clusters_NC[:, 0].long()
    paid_N = costs_NC[:, 0].clone()
    while True:
        surplus_K = torch.bincount(codes_N, minlength=len(wanted_K)) - wanted_K
        if not bool((surplus_K > 0).any()):
            return codes_N, paid_N
        rows = (surplus_K[codes_N] > 0).nonzero()[:, 0]
        full_K = surplus_K >= 0
        offers_RC = costs_NC[rows].masked_fill(full_K[clusters_NC[rows].long()], torch.inf)
        cost_R, place_R = offers_RC.min(dim=1)
        target_R = clusters_NC[rows].long().gather(1, place_R[:, None])[:, 0]
        if not bool(cost_R.isfinite().any()):
            offers = (costs_of(part).masked_fill(full_K, torch.inf) for part in rows.cpu().split(BLOCK_ROWS))
            cheapest = [block.min(dim=1) for block in offers]
            cost_R = torch.cat([block.values for block in cheapest])
            target_R = torch.cat([block.indices for block in cheapest])
        loss_R = cost_R - paid_N[rows]
        allowed = loss_R.isfinite().nonzero()[:, 0]
        allowed = allowed[_least(loss_R[allowed], codes_N[rows[allowed]], surplus_K)]
        allowed = allowed[_least(loss_R[allowed], target_R[allowed], -surplus_K)]
        codes_N[rows[allowed]] = target_R[allowed]
        paid_N[rows[allowed]] = cost_R[allowed]


def swap_rows(
    codes_N: torch.Tensor, paid_N: torch.Tensor, costs_NC: torch.Tensor, clusters_NC: torch.Tensor, codes: int
) -> int:
    """Let pairs of clusters exchange a row each where both together get cheaper; returns the number of exchanges.

    Every pair of clusters offers the row of each that loses least by going to the other, among the rows' candidates.
    The pairs are taken from the greatest gain down, a row at most once. `codes_N` and `paid_N` are changed in place.
    """
    change_M = (costs_NC - paid_N[:, None]).flatten()
    pair_M = (codes_N[:, None] * codes + clusters_NC).flatten()
    least_P = torch.full((codes * codes,), torch.inf, device=codes_N.device)
    least_P.scatter_reduce_(0, pair_M, change_M, "amin")
    gain_KK = least_P.view(codes, codes) + least_P.view(codes, codes).T
    worth_KK = torch.triu(gain_KK < 0.0, diagonal=1)
    first, second = worth_KK.nonzero(as_tuple=True)
    order = torch.argsort(gain_KK[worth_KK], stable=True)
    offered = (change_M == least_P[pair_M]).nonzero()[:, 0]
    mover_P = torch.full((codes * codes,), len(codes_N), device=codes_N.device)
    mover_P.scatter_reduce_(0, pair_M[offered], offered // costs_NC.shape[1], "amin")
    there, back = first[order] * codes + second[order], second[order] * codes + first[order]
    movers = mover_P.tolist()
    moved: dict[int, tuple[int, int]] = {}  # row -> its new cluster, and the pair of clusters it moves between
    for pair, reverse in zip(there.tolist(), back.tolist(), strict=True):
        ours, theirs = movers[pair], movers[reverse]
        if ours not in moved and theirs not in moved:
            moved[ours], moved[theirs] = (pair % codes, pair), (reverse % codes, reverse)
    if moved:
        rows = torch.tensor(list(moved), device=codes_N.device)
        targets, pairs = torch.tensor(list(moved.values()), device=codes_N.device).unbind(dim=1)
        codes_N[rows] = targets
        paid_N[rows] += least_P[pairs]
    return len(moved) // 2


def _least(losses_R: torch.Tensor, groups_R: torch.Tensor, counts_K: torch.Tensor) -> torch.Tensor:
    """Positions of the `counts_K[k]` least losses of each group k."""
    order = torch.argsort(losses_R, stable=True)
    order = order[torch.argsort(groups_R[order], stable=True)]
    sizes_K = torch.bincount(groups_R, minlength=len(counts_K))
    rank = torch.arange(len(order), device=order.device) - (sizes_K.cumsum(0) - sizes_K)[groups_R[order]]
    return order[rank < counts_K[groups_R[order]]]
