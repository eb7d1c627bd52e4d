"""The token-level objective of SRPO: clipped policy loss, truncated importance, penalty to a reference policy.

Three log-probabilities enter, all over the same allowed set and at the same temperature: those of the sampler (mu, the
rollout engine), of the learner when the step began (old) and of the learner now (current). Axis T: the response tokens
of a mini-batch or of any part of it. The loss of a part is `(weights_T * losses_T).sum()`; the weights are made once
for the whole mini-batch, so the losses and gradients of its parts add up to those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DIRECT, REASONING = 0, 1
MODE_COUNT = 2

TokenMean = Literal["per_mode", "per_part", "global", "per_response", "constant"]
TOKEN_MEANS = ("per_mode", "per_part", "global", "per_response", "constant")

# Beyond this distance (nats) the clips hold the policy loss constant, or the ratio is nil; without it, exp would
# overflow and its gradient would be 0 * inf.
MAXIMUM_LOG_RATIO = 20.0


@dataclass(frozen=True)
class ObjectiveSettings:
    """Constants of the objective.

    Attributes:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound on the ratio's effect where the advantage is negative (the loss is at most -A * dual_clip).
        kl_coefficient: of the k3 estimate of the divergence from the reference policy.
        importance_cap: truncation of exp(old - mu).
        token_mean: see `token_weights`.
        valid_mass_coefficient: weight of the mean log valid mass at places inside semantic IDs, which is added to what
            is maximised: how much of the unconstrained distribution lies on allowed tokens.
        true_answer_coefficient: weight of the true items' mean log-probability behind the policy's own chains, which is
            added to what is maximised as well, in reasoning mode.

    Raises:
        ValueError: a constant outside its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 10.0
    kl_coefficient: float = 0.001
    importance_cap: float = 2.0
    token_mean: TokenMean = "per_mode"
    valid_mass_coefficient: float = 0.0
    true_answer_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low must be in [0, 1), got {self.clip_low}")
        if self.clip_high < 0:
            raise ValueError(f"clip_high must not be negative, got {self.clip_high}")
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")
        if self.kl_coefficient < 0:
            raise ValueError(f"kl_coefficient must not be negative, got {self.kl_coefficient}")
        if self.valid_mass_coefficient < 0:
            raise ValueError(f"valid_mass_coefficient must not be negative, got {self.valid_mass_coefficient}")
        if self.true_answer_coefficient < 0:
            raise ValueError(f"true_answer_coefficient must not be negative, got {self.true_answer_coefficient}")
        if self.importance_cap <= 0:
            raise ValueError(f"importance_cap must be positive, got {self.importance_cap}")
        if self.token_mean not in TOKEN_MEANS:
            raise ValueError(f"token_mean must be one of {', '.join(TOKEN_MEANS)}, got {self.token_mean!r}")


def token_losses(
    current_T: Tensor,
    old_T: Tensor,
    sampler_T: Tensor,
    reference_T: Tensor,
    advantages_T: Tensor,
    settings: ObjectiveSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each response token, not yet weighted.

        r      = exp(current - old)
        policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A dual_clip where A < 0
        loss   = min(exp(old - mu), importance_cap) policy + kl_coefficient (exp(d) - d - 1),  d = reference - current

    Args:
        current_T: log-probabilities under the learner now, float [tokens]; the only argument that gets a gradient.
        old_T: under the learner when the step began (on policy with one mini-batch: the current ones).
        sampler_T: mu, under the rollout engine.
        reference_T: under the reference policy.
        advantages_T: the advantage of each token's response.
        settings: the constants.

    Returns:
        The losses, [tokens], in float32 (float64 for float64 input), and detached diagnostics of the same shape and
        dtype: `ratio` r; `importance`, after truncation; `importance_truncated`, `clipped` and `dual_clipped`, 1.0
        where that bound changes the loss; `kl`, the k3 estimate.

    Raises:
        ValueError: arguments of different shapes.
    """
    for name, values in (("old_T", old_T), ("sampler_T", sampler_T), ("reference_T", reference_T)):
        if values.shape != current_T.shape:
            raise ValueError(f"{name} has shape {list(values.shape)}, current_T has {list(current_T.shape)}")
    if advantages_T.shape != current_T.shape:
        raise ValueError(f"advantages_T has shape {list(advantages_T.shape)}, current_T has {list(current_T.shape)}")
    dtype = torch.promote_types(current_T.dtype, torch.float32)
    current = current_T.to(dtype)
    old, sampler, reference, advantages = (
        values.detach().to(dtype) for values in (old_T, sampler_T, reference_T, advantages_T)
    )

    ratio = torch.exp((current - old).clamp(-MAXIMUM_LOG_RATIO, MAXIMUM_LOG_RATIO))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    bound = -advantages * settings.dual_clip
    dual_clipped = (advantages < 0) & (pessimistic > bound)
    policy = torch.where(dual_clipped, bound, pessimistic)

    full_importance = torch.exp(old - sampler)
    importance = full_importance.clamp(max=settings.importance_cap)

    difference = reference - current
    kl = torch.exp(difference) - difference - 1

    losses = importance * policy + settings.kl_coefficient * kl
    diagnostics = {
        "ratio": ratio.detach(),
        "importance": importance,
        "importance_truncated": (full_importance > settings.importance_cap).to(dtype),
        "clipped": (clipped > unclipped).to(dtype),
        "dual_clipped": dual_clipped.to(dtype),
        "kl": kl.detach(),
    }
    return losses, diagnostics


def token_weights(
    mode_T: Tensor,
    counted_T: Tensor,
    prompt_share_by_mode: Sequence[float],
    token_mean: TokenMean = "per_mode",
    *,
    response_T: Tensor | None = None,
    longest: int | None = None,
    answer_T: Tensor | None = None,
) -> Tensor:
    """Weight of each token of a whole mini-batch in its loss.

    - "per_mode" takes the token mean inside each mode and weights the modes by their share of prompts: in a plain mean
      a direct response of five tokens would drown beside a reasoning chain. A mode without counted tokens gets nothing
      and the shares of the others are scaled up.
    - "per_part" also halves the share of reasoning between chains and answers: inside that mode an answer of four
      tokens drowns beside its chain just so, although the reward is the answer's.
    - "global" is the plain mean over all counted tokens.
    - "per_response" is GRPO's: the mean of each response, averaged over the responses that have a counted token.
    - "constant" is Dr.GRPO's: the sum over the counted tokens, divided by the responses times `longest`.

    The weights sum to 1 but for "constant". Call it on all tokens of the mini-batch (all micro-batches, all learner
    ranks), then slice.

    Args:
        mode_T: int [tokens], `DIRECT` (0) or `REASONING` (1).
        counted_T: bool [tokens], false where the allowed set has one token: nothing was chosen there, so the position
            has weight 0 and does not enlarge the denominator.
        prompt_share_by_mode: share of the mini-batch's prompts by mode (counts do as well), direct first.
        token_mean: which mean.
        response_T: int [tokens], number of each token's response from 0; for the last two means.
        longest: tokens that a response may have, for the last one.
        answer_T: bool [tokens], true in the answer, behind the chain; for "per_part".

    Returns:
        float32 [tokens] on the device of `mode_T`.

    Raises:
        ValueError: no token counts, an unknown mode or mean, shapes that differ, a mode with counted tokens whose share
            of prompts is not positive, or an argument that the mean needs and lacks.
    """
    if mode_T.ndim != 1 or mode_T.is_floating_point() or mode_T.dtype == torch.bool:
        raise ValueError(f"mode_T must be int [tokens], got {mode_T.dtype} of shape {list(mode_T.shape)}")
    if counted_T.dtype != torch.bool or counted_T.shape != mode_T.shape:
        raise ValueError(
            f"counted_T must be bool of shape {list(mode_T.shape)}, got {counted_T.dtype} {list(counted_T.shape)}"
        )
    if len(prompt_share_by_mode) != MODE_COUNT:
        raise ValueError(f"prompt_share_by_mode must have {MODE_COUNT} entries, got {len(prompt_share_by_mode)}")
    if ((mode_T < 0) | (mode_T >= MODE_COUNT)).any():
        raise ValueError(f"mode_T must hold {DIRECT} (direct) and {REASONING} (reasoning) only")
    if not counted_T.any():
        raise ValueError("no token of the mini-batch counts: every allowed set has a single token")

    if token_mean == "global":
        return counted_T.float() / counted_T.sum()
    if token_mean in ("per_response", "constant"):
        if response_T is None or response_T.shape != mode_T.shape:
            raise ValueError(f"token_mean {token_mean} needs response_T of shape {list(mode_T.shape)}")
        if token_mean == "constant":
            if not longest:
                raise ValueError("token_mean constant needs longest, the tokens that a response may have")
            return counted_T.float() / (len(response_T.unique()) * longest)
        tokens_R = torch.bincount(response_T[counted_T], minlength=int(response_T.max()) + 1)
        per_response = (1.0 / tokens_R.clamp(min=1).double() / (tokens_R > 0).sum())[response_T]
        return torch.where(counted_T, per_response, 0.0).float()
    part_T, shares = mode_T.long(), [float(share) for share in prompt_share_by_mode]
    if token_mean == "per_part":
        if answer_T is None or answer_T.dtype != torch.bool or answer_T.shape != mode_T.shape:
            raise ValueError(f"token_mean per_part needs answer_T, bool of shape {list(mode_T.shape)}")
        part_T = torch.where((part_T == REASONING) & answer_T, MODE_COUNT, part_T)
        shares = [shares[DIRECT], shares[REASONING] / 2, shares[REASONING] / 2]
    elif token_mean != "per_mode":
        raise ValueError(f"token_mean must be one of {', '.join(TOKEN_MEANS)}, got {token_mean!r}")
    tokens_P = torch.bincount(part_T[counted_T], minlength=len(shares)).double()
    share_P = torch.tensor(shares, dtype=torch.float64, device=mode_T.device)
    present_P = tokens_P > 0
    if not (share_P[present_P] > 0).all():
        raise ValueError(
            f"a mode with counted tokens needs a positive share of prompts, got shares {share_P.tolist()} for "
            f"{tokens_P.long().tolist()} counted tokens (direct, reasoning)"
        )
    share_P = torch.where(present_P, share_P, 0.0)
    weight_P = share_P / share_P.sum() / tokens_P.clamp(min=1)
    return torch.where(counted_T, weight_P[part_T], 0.0).float()
