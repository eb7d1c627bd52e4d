"""Bonus-calibrated group advantage estimation (BGAE) of GREAM, arXiv 2510.20815.

Every prompt has a group of responses. The plain part standardises a response's reward within its group; the bonus is
the analytic advantage of Pass@K training (arXiv 2508.10751), which favours groups that hit at least once in K tries.
Axes: G groups, R responses of all groups, group after group; groups may differ in size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageEstimator = Literal["bonus_calibrated", "group_relative", "centred", "pass_at_k"]


def group_advantages(
    rewards_R: Tensor, hits_R: Tensor, group_sizes_G: Tensor, estimator: AdvantageEstimator, *, k: int = 4
) -> Tensor:
    """Advantages by a named estimator: `bonus_calibrated_advantages` (GREAM), or for ablation
    `group_relative_advantages` (GRPO), `centred_advantages` (Dr.GRPO) and `pass_at_k_advantages`.

    Raises ValueError for an unknown name, and what the estimator raises.
    """
    if estimator == "bonus_calibrated":
        return bonus_calibrated_advantages(rewards_R, group_sizes_G, k=k, hits_R=hits_R)
    if estimator == "group_relative":
        return group_relative_advantages(rewards_R, group_sizes_G)
    if estimator == "centred":
        return centred_advantages(rewards_R, group_sizes_G)
    if estimator == "pass_at_k":
        return pass_at_k_advantages(rewards_R, hits_R, group_sizes_G, k=k)
    raise ValueError(f"there is no advantage estimator {estimator!r}")


def centred_advantages(rewards_R: Tensor, group_sizes_G: Tensor) -> Tensor:
    """R_i - mean(R) within each group: Dr.GRPO (arXiv 2503.20783), which leaves out the standard deviation because it
    weights questions by how hard they are. Shape, dtype and errors as `group_relative_advantages`."""
    group_R = _group_of(rewards_R, group_sizes_G)
    return _centred(rewards_R.double(), group_R, group_sizes_G).to(rewards_R.dtype)


def pass_at_k_advantages(
    rewards_R: Tensor, hits_R: Tensor, group_sizes_G: Tensor, *, k: int = 4, eps: float = 1e-6
) -> Tensor:
    """The Pass@K advantage of arXiv 2508.10751 alone, which looks at hits and not at rewards. Shape and dtype of the
    rewards; errors as `bonus_calibrated_advantages`."""
    group_R = _group_of(rewards_R, group_sizes_G)
    _check_hits(rewards_R, hits_R, k)
    return _pass_at_k_bonus(hits_R, group_R, group_sizes_G, k, eps).to(rewards_R.dtype)


def group_relative_advantages(rewards_R: Tensor, group_sizes_G: Tensor, eps: float = 1e-6) -> Tensor:
    """(R_i - mean(R)) / (std(R, unbiased) + eps) within each group.

    Args:
        rewards_R: float [responses], group after group.
        group_sizes_G: int64 [groups], responses of each.
        eps: keeps the quotient finite in a group without variance.

    Returns:
        [responses] of the same dtype and device, computed in float64; 0 in a group of one response.

    Raises:
        ValueError: rewards that are not a finite float vector, or sizes that are below 1 or do not add up to it.
    """
    group_R = _group_of(rewards_R, group_sizes_G)
    centred_R = _centred(rewards_R.double(), group_R, group_sizes_G)
    variance_G = _sums(centred_R.square(), group_R, group_sizes_G) / (group_sizes_G - 1).clamp(min=1)
    return (centred_R / (variance_G.sqrt() + eps)[group_R]).to(rewards_R.dtype)


def bonus_calibrated_advantages(
    rewards_R: Tensor, group_sizes_G: Tensor, k: int = 4, eps: float = 1e-6, hits_R: Tensor | None = None
) -> Tensor:
    """Group-relative advantages plus the Pass@K bonus.

    With c hits among n responses, C(a, b) = 0 for a < b, rho = 1 - C(n-c, K) / C(n, K) and
    sigma = sqrt(rho (1 - rho)), the bonus is

        hit    (1 - rho) / (sigma + eps)
        miss   (1 - rho - C(n-c-1, K-1) / C(n-1, K-1)) / (sigma + eps)

    It sums to zero over a group and is 0 without a hit, with fewer than K misses, and for n < K.

    Args:
        rewards_R: float [responses], group after group.
        group_sizes_G: int64 [groups], responses of each.
        k: K of Pass@K.
        eps: of both quotients.
        hits_R: bool [responses], which responses answer with the true item; by default those of reward 1. Pass them
            wherever the reward is composed of more than the answer.

    Returns:
        [responses] of the dtype and device of the rewards, computed in float64; the advantage of every token of a
        response.

    Raises:
        ValueError: k below 1, rewards and sizes as above, or hits that are not a bool vector of the rewards' shape.
    """
    group_R = _group_of(rewards_R, group_sizes_G)
    hits = rewards_R == 1 if hits_R is None else hits_R
    _check_hits(rewards_R, hits, k)
    # Added in float64 and rounded once.
    relative_R = group_relative_advantages(rewards_R.double(), group_sizes_G, eps)
    return (relative_R + _pass_at_k_bonus(hits, group_R, group_sizes_G, k, eps)).to(rewards_R.dtype)


def groups_with_variance(rewards_R: Tensor, group_sizes_G: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Which groups dynamic sampling keeps: bool [groups], max - min >= tolerance; false for a group of one.

    The range and not the standard deviation decides: equal float32 rewards can have a standard deviation above zero.

    Raises:
        ValueError: rewards and sizes as above.
    """
    group_R = _group_of(rewards_R, group_sizes_G)
    rewards = rewards_R.double()
    start_G = torch.zeros(len(group_sizes_G), dtype=torch.float64, device=rewards.device)
    high_G = start_G.scatter_reduce(0, group_R, rewards, "amax", include_self=False)
    low_G = start_G.scatter_reduce(0, group_R, rewards, "amin", include_self=False)
    return (high_G - low_G >= tolerance) & (group_sizes_G > 1)


def _centred(rewards_R: Tensor, group_R: Tensor, group_sizes_G: Tensor) -> Tensor:
    """Rewards less their group's mean, exactly 0 in a group of one."""
    return rewards_R - (_sums(rewards_R, group_R, group_sizes_G) / group_sizes_G)[group_R]


def _sums(values_R: Tensor, group_R: Tensor, group_sizes_G: Tensor) -> Tensor:
    """float64 [groups]."""
    sums_G = torch.zeros(len(group_sizes_G), dtype=torch.float64, device=values_R.device)
    return sums_G.index_add(0, group_R, values_R.double())


def _pass_at_k_bonus(hits_R: Tensor, group_R: Tensor, group_sizes_G: Tensor, k: int, eps: float) -> Tensor:
    """The bonus alone, float64 [responses]."""
    total_G = group_sizes_G.double()
    misses_G = total_G - _sums(hits_R, group_R, group_sizes_G)
    all_miss_G = _ratio_of_combinations(misses_G, total_G, k)  # 1 - rho
    all_others_miss_G = _ratio_of_combinations(misses_G - 1, total_G - 1, k - 1)
    scale_G = torch.sqrt((1 - all_miss_G) * all_miss_G) + eps
    hit_G = torch.where(group_sizes_G < k, 0.0, all_miss_G / scale_G)
    miss_G = torch.where(group_sizes_G < k, 0.0, (all_miss_G - all_others_miss_G) / scale_G)
    return torch.where(hits_R, hit_G[group_R], miss_G[group_R])


def _ratio_of_combinations(chosen_from_G: Tensor, total_G: Tensor, k: int) -> Tensor:
    """C(chosen_from, k) / C(total, k) for k <= total, as a product of k quotients; of no meaning for k > total.

    Exactly 1 for chosen_from = total and exactly 0 below k: there the quotients hold a zero.
    """
    ratio_G = torch.ones_like(chosen_from_G)
    for place in range(k):
        ratio_G = ratio_G * ((chosen_from_G - place).clamp(min=0) / (total_G - place).clamp(min=1))
    return ratio_G


def _group_of(rewards_R: Tensor, group_sizes_G: Tensor) -> Tensor:
    """int64 [responses], each response's group; raises ValueError for rewards and sizes that cannot be."""
    if rewards_R.ndim != 1 or not rewards_R.is_floating_point():
        raise ValueError(f"rewards_R must be float [responses], got {rewards_R.dtype} {list(rewards_R.shape)}")
    if group_sizes_G.ndim != 1 or group_sizes_G.dtype != torch.int64 or bool((group_sizes_G < 1).any()):
        raise ValueError(
            f"group_sizes_G must be int64 [groups] of at least 1 each, got {group_sizes_G.dtype} "
            f"{group_sizes_G.flatten().tolist()[:8]}"
        )
    if int(group_sizes_G.sum()) != len(rewards_R):
        raise ValueError(f"groups of {int(group_sizes_G.sum())} responses, but there are {len(rewards_R)} rewards")
    group_R = torch.repeat_interleave(group_sizes_G)
    finite_R = torch.isfinite(rewards_R)
    if not bool(finite_R.all()):
        row = int(torch.nonzero(~finite_R)[0])
        group = int(group_R[row])
        raise ValueError(
            f"group {group}, response {row - int(group_sizes_G[:group].sum())} has the reward "
            f"{rewards_R[row].item()}; rewards must be finite"
        )
    return group_R


def _check_hits(rewards_R: Tensor, hits_R: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if hits_R.dtype != torch.bool or hits_R.shape != rewards_R.shape:
        raise ValueError(
            f"hits_R must be bool of shape {list(rewards_R.shape)}, got {hits_R.dtype} of shape {list(hits_R.shape)}"
        )
