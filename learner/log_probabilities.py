"""Exact log-probabilities of response tokens over the allowed sets of the constraint.

Work of the output head is done only where a token is predicted: over the whole vocabulary less the forbidden tokens in
free text, and over the rows of the allowed tokens alone inside a semantic ID. Policy, old and reference values come
from here.

Logits over the vocabulary are made chunk by chunk and not kept by autograd: of a chunk only the log-sum-exps stay, and
its probabilities where they are small enough; the backward pass makes them again, and both of its products from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from item_index.constraint import AllowedTokens

CHUNK_BYTES = 64 * 2**20  # of logits at once
KEPT_BYTES = 128 * 2**20  # of probabilities that wait for the backward pass; above it they are made again
NEVER = float("-inf")


def full_vocabulary_log_probabilities(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor) -> Tensor:
    """[T]: log-softmax over the whole vocabulary at the targets; float32, or float64 for such states."""
    return _vocabulary_log_probabilities(hidden_TH, head_VH, targets_T, _Free(), temperature=1.0)


def allowed_log_probabilities(
    hidden_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    allowed: AllowedTokens,
    free_text_masks: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """[T]: log-probability of each target renormalised over its allowed set; float32, or float64 for such states.

    `free_text_masks` is bool [kinds, V]. A target outside its allowed set raises ValueError: then sampler and learner
    do not agree on the constraint.
    """
    if len(allowed.free_text) != len(targets_T):
        raise ValueError(f"{len(targets_T)} targets but {len(allowed.free_text)} allowed sets")
    result = hidden_TH.new_zeros(len(targets_T), dtype=_precise(hidden_TH))
    kinds_T = torch.from_numpy(allowed.free_text.astype("int64")).to(hidden_TH.device)
    if len(rows := torch.nonzero(kinds_T < 0).flatten()):
        listed = _Listed(allowed, rows)
        values, inside = _listed_log_probabilities(hidden_TH[rows], head_VH, targets_T[rows], listed, temperature)
        _check(inside, rows, targets_T)
        result = result.index_put((rows,), values)
    for kind, mask in enumerate(free_text_masks):
        if len(rows := torch.nonzero(kinds_T == kind).flatten()):
            listed = _Listed(allowed, rows)
            own = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            own[listed.row_N[listed.token_N == targets_T[rows][listed.row_N]]] = True
            _check(mask[targets_T[rows]] | own, rows, targets_T)
            free = _Free(torch.nonzero(~mask).flatten(), listed.row_N, listed.token_N)
            values = _vocabulary_log_probabilities(
                hidden_TH[rows], head_VH, targets_T[rows], free, temperature=temperature
            )
            result = result.index_put((rows,), values)
    return result


def log_valid_masses(
    hidden_CH: Tensor, head_VH: Tensor, targets_C: Tensor, allowed_C: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log Z [C]: how much of the distribution over the whole vocabulary lies on the allowed tokens.

    It is the target's log-probability over the vocabulary less `allowed_C`, the one over its allowed set, because
    p_allowed = p / Z. Gradients flow through both.
    """
    whole_C = _vocabulary_log_probabilities(hidden_CH, head_VH, targets_C, _Free(), temperature=temperature)
    return whole_C - allowed_C


class _Listed:
    """The listed tokens of some positions: `token_N` is allowed at position `row_N` of them."""

    def __init__(self, allowed: AllowedTokens, rows: Tensor) -> None:
        listed = allowed.listed.select(rows.cpu().numpy())
        self.row_N = torch.repeat_interleave(torch.from_numpy(listed.lengths)).to(rows.device)
        self.token_N = torch.from_numpy(listed.values).to(rows.device)


def _listed_log_probabilities(
    hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, listed: _Listed, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the listed tokens alone, and bool [T]: whether the target is listed.

    One product with the rows of the head that any position lists: they are few, and a gather of the rows that each
    position lists would read more than the product computes.
    """
    tokens_C, column_N = listed.token_N.unique(return_inverse=True)
    logits_TC = (hidden_TH @ head_VH.index_select(0, tokens_C).T).to(_precise(hidden_TH)) / temperature
    forbidden_TC = torch.ones(logits_TC.shape, dtype=torch.bool, device=logits_TC.device)
    forbidden_TC[listed.row_N, column_N] = False
    target_T = torch.searchsorted(tokens_C, targets_T).clamp(max=len(tokens_C) - 1)
    inside_T = (tokens_C[target_T] == targets_T) & ~forbidden_TC.gather(1, target_T[:, None])[:, 0]
    logits_TC = logits_TC.masked_fill(forbidden_TC, NEVER)
    return logits_TC.gather(1, target_T[:, None])[:, 0] - logits_TC.logsumexp(dim=1), inside_T


class _Free:
    """The allowed sets of T positions: the vocabulary less `forbidden`, but with `token_N` at position `row_N`."""

    def __init__(
        self, forbidden: Tensor | None = None, row_N: Tensor | None = None, token_N: Tensor | None = None
    ) -> None:
        self.forbidden, self.row_N, self.token_N = forbidden, row_N, token_N

    def forbid(self, logits_CV: Tensor, rows: slice) -> None:
        """Take the forbidden tokens out of the logits of some positions, in place."""
        if self.forbidden is None or not len(self.forbidden):
            return
        if self.row_N is None or self.token_N is None or not len(self.row_N):
            logits_CV.index_fill_(1, self.forbidden, NEVER)
            return
        here = (self.row_N >= rows.start) & (self.row_N < rows.stop)
        place = (self.row_N[here] - rows.start, self.token_N[here])
        kept = logits_CV[place]
        logits_CV.index_fill_(1, self.forbidden, NEVER)
        logits_CV[place] = kept


def _vocabulary_log_probabilities(
    hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, free: _Free, *, temperature: float
) -> Tensor:
    """[T]: log-probabilities over the vocabulary less what is forbidden."""
    return _VocabularyLogProbabilities.apply(hidden_TH, head_VH, targets_T, free, temperature, torch.is_grad_enabled())


class _VocabularyLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, free: _Free, temperature: float,
        with_gradient: bool,
    ) -> Tensor:  # fmt: skip
        values_T = hidden_TH.new_empty(len(hidden_TH), dtype=_precise(hidden_TH))
        sums_T, kept = torch.empty_like(values_T), []
        keep = with_gradient and len(hidden_TH) * len(head_VH) * values_T.element_size() <= KEPT_BYTES
        for rows in _chunks(hidden_TH, head_VH):
            logits_CV = _logits(hidden_TH[rows], head_VH, free, rows, temperature)
            target_C1 = targets_T[rows, None]
            chosen_C1 = logits_CV.gather(1, target_C1)
            top_C1 = logits_CV.amax(dim=1, keepdim=True)
            total_C1 = logits_CV.sub_(top_C1).exp_().sum(dim=1, keepdim=True)
            sums_T[rows] = (top_C1 + total_C1.log())[:, 0]
            values_T[rows] = chosen_C1[:, 0] - sums_T[rows]
            if keep:
                kept.append(logits_CV.div_(total_C1))
        ctx.save_for_backward(hidden_TH, head_VH, targets_T, sums_T)
        ctx.free, ctx.temperature, ctx.kept = free, temperature, kept
        return values_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, head_VH, targets_T, sums_T = ctx.saved_tensors
        gradient_T = gradients[0] / ctx.temperature
        hidden_gradient = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        head_gradient = torch.zeros_like(head_VH, dtype=sums_T.dtype) if ctx.needs_input_grad[1] else None
        for number, rows in enumerate(_chunks(hidden_TH, head_VH)):
            if ctx.kept:
                probabilities_CV = ctx.kept[number]
                ctx.kept[number] = None
            else:
                probabilities_CV = _logits(hidden_TH[rows], head_VH, ctx.free, rows, ctx.temperature)
                probabilities_CV.sub_(sums_T[rows, None]).exp_()
            # The gradient at the logits: g (one at the target - probability).
            at_logits_CV = probabilities_CV.mul_(-gradient_T[rows, None])
            at_logits_CV.scatter_add_(1, targets_T[rows, None], gradient_T[rows, None])
            at_logits_CV = at_logits_CV.to(head_VH.dtype)
            if hidden_gradient is not None:
                torch.mm(at_logits_CV, head_VH, out=hidden_gradient[rows])
            if head_gradient is not None and head_gradient.dtype == head_VH.dtype:
                head_gradient.addmm_(at_logits_CV.T, hidden_TH[rows])
            elif head_gradient is not None:
                head_gradient += at_logits_CV.T @ hidden_TH[rows]
        return hidden_gradient, None if head_gradient is None else head_gradient.to(head_VH.dtype), *[None] * 4


def _chunks(hidden_TH: Tensor, head_VH: Tensor) -> Iterator[slice]:
    """Positions whose logits are at most `CHUNK_BYTES` together, one position at least."""
    size = max(1, CHUNK_BYTES // (len(head_VH) * _precise(hidden_TH).itemsize))
    return (slice(start, min(start + size, len(hidden_TH))) for start in range(0, len(hidden_TH), size))


def _logits(hidden_CH: Tensor, head_VH: Tensor, free: _Free, rows: slice, temperature: float) -> Tensor:
    """[C, V] in full precision, forbidden ones at minus infinity; nobody else holds them."""
    logits_CV = (hidden_CH @ head_VH.T).to(_precise(hidden_CH))
    if temperature != 1.0:
        logits_CV /= temperature
    free.forbid(logits_CV, rows)
    return logits_CV


def _precise(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _check(inside_T: Tensor, rows: Tensor, targets_T: Tensor) -> None:
    if not bool(inside_T.all()):
        row = int(rows[~inside_T][0])
        raise ValueError(f"position {row}: token {int(targets_T[row])} is outside its allowed set")
