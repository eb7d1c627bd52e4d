"""Bonus-calibrated group advantage estimation (BGAE) of GREAM, arXiv 2510.20815.

Every prompt has a group of n responses. The plain part standardises a response's reward within its group; the bonus is
the analytic advantage of Pass@K training (arXiv 2508.10751), which favours groups that hit at least once in K tries.
Axes: G groups, N responses of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageEstimator = Literal["bonus_calibrated", "group_relative", "centred", "pass_at_k"]


def group_advantages(rewards_GN: Tensor, hits_GN: Tensor, estimator: AdvantageEstimator, *, k: int = 4) -> Tensor:
    """Advantages by a named estimator: `bonus_calibrated_advantages` (GREAM), or for ablation
    `group_relative_advantages` (GRPO), `centred_advantages` (Dr.GRPO) and `pass_at_k_advantages`.

    Raises ValueError for an unknown name, and what the estimator raises.
    """
    if estimator == "bonus_calibrated":
        return bonus_calibrated_advantages(rewards_GN, k=k, hits_GN=hits_GN)
    if estimator == "group_relative":
        return group_relative_advantages(rewards_GN)
    if estimator == "centred":
        return centred_advantages(rewards_GN)
    if estimator == "pass_at_k":
        return pass_at_k_advantages(rewards_GN, hits_GN, k=k)
    raise ValueError(f"there is no advantage estimator {estimator!r}")


def centred_advantages(rewards_GN: Tensor) -> Tensor:
    """R_i - mean(R) within each group: Dr.GRPO (arXiv 2503.20783), which leaves out the standard deviation because it
    weights questions by how hard they are. Shape, dtype and errors as `group_relative_advantages`."""
    _check_rewards(rewards_GN)
    rewards = rewards_GN.double()
    return (rewards - rewards.mean(dim=1, keepdim=True)).to(rewards_GN.dtype)


def pass_at_k_advantages(rewards_GN: Tensor, hits_GN: Tensor, *, k: int = 4, eps: float = 1e-6) -> Tensor:
    """The Pass@K advantage of arXiv 2508.10751 alone, which looks at hits and not at rewards. Shape and dtype of the
    rewards; errors as `bonus_calibrated_advantages`."""
    _check_rewards(rewards_GN)
    _check_hits(rewards_GN, hits_GN, k)
    return _pass_at_k_bonus(hits_GN, k, eps).to(rewards_GN.dtype)


def group_relative_advantages(rewards_GN: Tensor, eps: float = 1e-6) -> Tensor:
    """(R_i - mean(R)) / (std(R, unbiased) + eps) within each group.

    Args:
        rewards_GN: float [groups, responses].
        eps: keeps the quotient finite in a group without variance.

    Returns:
        [groups, responses] of the same dtype and device, computed in float64; 0 for a group of one response.

    Raises:
        ValueError: rewards that are not a finite float matrix with at least one response a group.
    """
    _check_rewards(rewards_GN)
    if rewards_GN.shape[1] == 1:
        return torch.zeros_like(rewards_GN)
    rewards = rewards_GN.double()
    std_G1, mean_G1 = torch.std_mean(rewards, dim=1, correction=1, keepdim=True)
    return ((rewards - mean_G1) / (std_G1 + eps)).to(rewards_GN.dtype)


def bonus_calibrated_advantages(
    rewards_GN: Tensor, k: int = 4, eps: float = 1e-6, hits_GN: Tensor | None = None
) -> Tensor:
    """Group-relative advantages plus the Pass@K bonus.

    With c hits among n responses, C(a, b) = 0 for a < b, rho = 1 - C(n-c, K) / C(n, K) and
    sigma = sqrt(rho (1 - rho)), the bonus is

        hit    (1 - rho) / (sigma + eps)
        miss   (1 - rho - C(n-c-1, K-1) / C(n-1, K-1)) / (sigma + eps)

    It sums to zero over a group and is 0 without a hit, with fewer than K misses, and for n < K.

    Args:
        rewards_GN: float [groups, responses].
        k: K of Pass@K.
        eps: of both quotients.
        hits_GN: bool [groups, responses], which responses answer with the true item; by default those of reward 1.
            Pass them wherever the reward is composed of more than the answer.

    Returns:
        [groups, responses] of the dtype and device of the rewards, computed in float64; the advantage of every token
        of a response.

    Raises:
        ValueError: k below 1, rewards as above, or hits that are not a bool matrix of the rewards' shape.
    """
    _check_rewards(rewards_GN)
    hits = rewards_GN == 1 if hits_GN is None else hits_GN
    _check_hits(rewards_GN, hits, k)
    # Added in float64 and rounded once.
    relative_GN = group_relative_advantages(rewards_GN.double(), eps)
    return (relative_GN + _pass_at_k_bonus(hits, k, eps)).to(rewards_GN.dtype)


def groups_with_variance(rewards_GN: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Which groups dynamic sampling keeps: bool [groups], max - min >= tolerance; false for a group of one.

    The range and not the standard deviation decides: equal float32 rewards can have a standard deviation above zero.

    Raises:
        ValueError: rewards as above.
    """
    _check_rewards(rewards_GN)
    if rewards_GN.shape[1] == 1:
        return torch.zeros(rewards_GN.shape[0], dtype=torch.bool, device=rewards_GN.device)
    rewards = rewards_GN.double()
    return rewards.amax(dim=1) - rewards.amin(dim=1) >= tolerance


def _pass_at_k_bonus(hits_GN: Tensor, k: int, eps: float) -> Tensor:
    """The bonus alone, float64 [groups, responses]."""
    responses = hits_GN.shape[1]
    hit_count_G1 = hits_GN.sum(dim=1, keepdim=True).double()
    if responses < k:
        return torch.zeros_like(hits_GN, dtype=torch.float64)
    misses_G1 = responses - hit_count_G1
    all_miss_G1 = _ratio_of_combinations(misses_G1, responses, k)  # 1 - rho
    all_others_miss_G1 = _ratio_of_combinations(misses_G1 - 1, responses - 1, k - 1)
    scale_G1 = torch.sqrt((1 - all_miss_G1) * all_miss_G1) + eps
    return torch.where(hits_GN, all_miss_G1, all_miss_G1 - all_others_miss_G1) / scale_G1


def _ratio_of_combinations(chosen_from: Tensor, total: int, k: int) -> Tensor:
    """C(chosen_from, k) / C(total, k) for k <= total, as a product of k quotients.

    Exactly 1 for chosen_from = total and exactly 0 below k: there the quotients hold a zero.
    """
    ratio = torch.ones_like(chosen_from)
    for place in range(k):
        ratio = ratio * ((chosen_from - place).clamp(min=0) / (total - place))
    return ratio


def _check_hits(rewards_GN: Tensor, hits_GN: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if hits_GN.dtype != torch.bool or hits_GN.shape != rewards_GN.shape:
        raise ValueError(
            f"hits_GN must be bool of shape {list(rewards_GN.shape)}, got {hits_GN.dtype} of shape "
            f"{list(hits_GN.shape)}"
        )


def _check_rewards(rewards_GN: Tensor) -> None:
    if rewards_GN.ndim != 2 or rewards_GN.shape[1] == 0 or not rewards_GN.is_floating_point():
        raise ValueError(
            f"rewards_GN must be float [groups, responses] with at least one response, "
            f"got {rewards_GN.dtype} of shape {list(rewards_GN.shape)}"
        )
    finite = torch.isfinite(rewards_GN)
    if not finite.all():
        group, response = torch.nonzero(~finite)[0].tolist()
        raise ValueError(
            f"rewards_GN: group {group}, response {response} has the reward {rewards_GN[group, response].item()}; "
            f"rewards must be finite"
        )
