"""Exact log-probabilities of response tokens over the allowed sets of the constraint.

Work of the output head is done only where a token is predicted: over the whole vocabulary (masked) in free text, and
over the rows of the allowed children alone inside a semantic ID. Policy, old and reference values come from here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from item_index.constraint import AllowedTokens


def full_vocabulary_log_probabilities(
    hidden_TH: torch.Tensor, head_VH: torch.Tensor, targets_T: torch.Tensor, *, chunk: int = 4096
) -> torch.Tensor:
    """float32 [T]: log-softmax over the whole vocabulary at the targets (supervised training)."""
    parts = [
        -F.cross_entropy((hidden @ head_VH.T).float(), targets, reduction="none")
        for hidden, targets in zip(hidden_TH.split(chunk), targets_T.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def allowed_log_probabilities(
    hidden_TH: torch.Tensor,
    head_VH: torch.Tensor,
    targets_T: torch.Tensor,
    allowed: AllowedTokens,
    free_text_masks: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 4096,
) -> torch.Tensor:
    """float32 [T]: log-probability of each target renormalised over its allowed set.

    `free_text_masks` is bool [kinds, V]. A target outside its allowed set raises ValueError: then sampler and learner
    do not agree on the constraint.
    """
    if len(allowed.free_text) != len(targets_T):
        raise ValueError(f"{len(targets_T)} targets but {len(allowed.free_text)} allowed sets")
    result = hidden_TH.new_zeros(len(targets_T), dtype=torch.float32)
    kinds_T = torch.from_numpy(allowed.free_text.astype("int64")).to(hidden_TH.device)
    for rows in torch.nonzero(kinds_T < 0).flatten().split(chunk):
        table = torch.from_numpy(allowed.padded(rows.cpu().numpy())).to(hidden_TH.device)
        is_target = table == targets_T[rows, None]
        _check(is_target.any(dim=1), rows, targets_T)
        # Gathering rows of the head: [rows, widest, H] stays small because a node has few children.
        logits = torch.einsum("th,tch->tc", hidden_TH[rows], head_VH[table.clamp(min=0)]).float() / temperature
        logits = logits.masked_fill(table < 0, float("-inf"))
        chosen = logits.masked_fill(~is_target, 0.0).sum(dim=1)
        result = result.index_put((rows,), chosen - logits.logsumexp(dim=1))
    for rows in torch.nonzero(kinds_T >= 0).flatten().split(chunk):
        permitted = free_text_masks[kinds_T[rows]]
        listed = allowed.listed.select(rows.cpu().numpy())
        if len(listed.values):
            permitted[
                torch.repeat_interleave(torch.arange(len(rows)), torch.from_numpy(listed.lengths)),
                torch.from_numpy(listed.values),
            ] = True
        targets = targets_T[rows, None]
        _check(permitted.gather(1, targets)[:, 0], rows, targets_T)
        logits = (hidden_TH[rows] @ head_VH.T).float() / temperature
        logits = logits.masked_fill(~permitted, float("-inf"))
        result = result.index_put((rows,), logits.gather(1, targets)[:, 0] - logits.logsumexp(dim=1))
    return result


def _check(inside: torch.Tensor, rows: torch.Tensor, targets_T: torch.Tensor) -> None:
    if not bool(inside.all()):
        row = int(rows[~inside][0])
        raise ValueError(f"position {row}: token {int(targets_T[row])} is outside its allowed set")
