"""Attention within the rows of one packed sequence: every linear layer sees tokens without padding, and no row another.

Rows lie one after the other in a sequence [1, T]. A mask [T, T] would make attention cost T squared; here each row
costs its own length squared: rows of similar length form a bucket, are laid out as a small padded batch for the time of
the attention alone, and go through causal scaled dot-product attention. Padding stands behind a row's tokens, so a
causal query never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

PACKED_ROWS = "packed_rows"
# A bucket ends where a row is shorter than this share of its longest one: padding against more, smaller calls.
SHORTEST_OF_BUCKET = 0.75


@dataclass(frozen=True)
class RowBucket:
    """Consecutive rows of a packed sequence that are attended together.

    Attributes:
        span: their first token and the one after their last.
        rows, longest: shape of the padded layout.
        gather: int64 [rows x longest], place within the span of every padded place (a repeated one for padding); None
            where all rows are equally long, so that a view does.
        keep: int64 [tokens of the span], padded place of every token; None likewise.
    """

    span: tuple[int, int]
    rows: int
    longest: int
    gather: torch.Tensor | None
    keep: torch.Tensor | None

    def padded(self, states_HTD: torch.Tensor) -> torch.Tensor:
        """[rows, heads, longest, D] of the span's states [heads, tokens, D]; what stands in padding has no meaning."""
        states_THD = states_HTD.transpose(0, 1)
        if self.gather is not None:
            states_THD = states_THD.index_select(0, self.gather)
        return states_THD.reshape(self.rows, self.longest, *states_THD.shape[1:]).transpose(1, 2)

    def to(self, device: torch.device | str) -> RowBucket:
        """The same on another device."""
        if self.gather is None or self.keep is None:
            return self
        return replace(self, gather=self.gather.to(device), keep=self.keep.to(device))


def row_buckets(lengths: Sequence[int] | np.ndarray) -> tuple[RowBucket, ...]:
    """Buckets of rows whose lengths fall: longest first, as `pack_rows` orders them. Raises ValueError otherwise."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if (np.diff(lengths) > 0).any() or (lengths < 1).any():
        raise ValueError("rows must hold a token each and be ordered by falling length")
    cuts = [0]
    for row, length in enumerate(lengths.tolist()):
        if length < SHORTEST_OF_BUCKET * lengths[cuts[-1]]:
            cuts.append(row)
    cuts.append(len(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    buckets = []
    for first, stop in pairwise(cuts):
        inside, longest = lengths[first:stop], int(lengths[first])
        gather = keep = None
        if inside[-1] != longest:
            place = np.arange(longest)
            valid = place < inside[:, None]
            begin = (starts[first:stop] - starts[first])[:, None]
            gather = torch.from_numpy(np.where(valid, begin + place, begin).reshape(-1))
            keep = torch.from_numpy(np.flatnonzero(valid))
        buckets.append(RowBucket((int(starts[first]), int(starts[stop])), stop - first, longest, gather, keep))
    return tuple(buckets)


def packed_row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_rows: Sequence[RowBucket],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, T, D] queries (keys and values of as many heads or fewer) to
    [1, T, heads, D].

    Raises ValueError for a model with a sliding window, which rows of any length would need a mask for.
    """
    if sliding_window is not None:
        raise ValueError(f"packed rows do not know sliding windows, and this model has one of {sliding_window}")
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for bucket in packed_rows:
        start, stop = bucket.span
        attended = torch.nn.functional.scaled_dot_product_attention(
            bucket.padded(query[0, :, start:stop]),
            bucket.padded(key[0, :, start:stop]),
            bucket.padded(value[0, :, start:stop]),
            dropout_p=dropout if module.training else 0.0,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        flat = attended.transpose(1, 2).flatten(0, 1)
        parts.append(flat if bucket.keep is None else flat.index_select(0, bucket.keep))
    return torch.cat(parts).unsqueeze(0), None


# The model makes no mask for this implementation: the buckets say who sees whom.
AttentionInterface.register(PACKED_ROWS, packed_row_attention)
AttentionMaskInterface.register(PACKED_ROWS, lambda *_, **__: None)
