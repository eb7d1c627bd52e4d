"""Attention within one packed sequence [1, T]: linear layers see no padding, and a token sees only what it may.

A sequence is a list of parts, each of which attends within its own tokens. A mask [T, T] would make attention cost T
squared; here it costs what its parts cost:

- `RowBucket`: rows of similar length, laid out as a small padded batch for the time of the attention alone. Padding
  stands behind a row's tokens, so a causal query never sees it.
- `PackedGroup`: a prompt once, and behind it the responses to it, each of which sees the prompt and itself. All
  responses together attend to the prompt without a mask and without copies of its keys and values, and each to itself
  as in a bucket; the two softmaxes are merged by their log-sum-exps. A short group is one call under a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from learner.shared_prefix import shared_prefix_attention

PACKED = "packed"
# A bucket ends where a row is shorter than this share of its longest one: padding against more, smaller calls.
SHORTEST_OF_BUCKET = 0.75
# A group of no more tokens attends in one call under a mask: what merging saves is then less than its calls cost.
MASKED_TOKENS = 300


class PackedPart(Protocol):
    """Consecutive tokens of a packed sequence that attend to one another alone; `span` is the first and the end, and
    `padding` counts the places beside them in their attention."""

    @property
    def span(self) -> tuple[int, int]: ...

    @property
    def padding(self) -> int: ...

    def attend(
        self, query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, *, scaling: float | None, dropout: float
    ) -> Tensor:
        """[tokens, heads, D] out of the span's states; keys and values may have fewer heads."""
        ...

    def to(self, device: torch.device | str) -> PackedPart: ...


@dataclass(frozen=True)
class RowBucket:
    """Rows that are attended together, each causally.

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
    gather: Tensor | None
    keep: Tensor | None

    @classmethod
    def of(cls, lengths: np.ndarray, start: int) -> RowBucket:
        """Rows of some lengths, at least one token each, in the order in which they lie from `start` on."""
        longest, starts = int(lengths.max()), np.cumsum(lengths) - lengths
        gather = keep = None
        if lengths.min() != longest:
            place = np.arange(longest)
            valid = place < lengths[:, None]
            gather = torch.from_numpy(np.where(valid, starts[:, None] + place, starts[:, None]).reshape(-1))
            keep = torch.from_numpy(np.flatnonzero(valid))
        return cls((start, start + int(lengths.sum())), len(lengths), longest, gather, keep)

    @property
    def padding(self) -> int:
        """See `PackedPart`."""
        return self.rows * self.longest - (self.span[1] - self.span[0])

    def padded(self, states_HTD: Tensor) -> Tensor:
        """[rows, heads, longest, D] of the span's states [heads, tokens, D]; what stands in padding has no meaning."""
        states_THD = states_HTD.transpose(0, 1)
        if self.gather is not None:
            states_THD = states_THD.index_select(0, self.gather)
        return states_THD.reshape(self.rows, self.longest, *states_THD.shape[1:]).transpose(1, 2)

    def flat(self, padded_RHLD: Tensor) -> Tensor:
        """[tokens, heads, D]: the inverse of `padded`."""
        flat = padded_RHLD.transpose(1, 2).flatten(0, 1)
        return flat if self.keep is None else flat.index_select(0, self.keep)

    def attend(
        self, query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, *, scaling: float | None, dropout: float
    ) -> Tensor:
        """See `PackedPart`."""
        attended = scaled_dot_product_attention(
            self.padded(query_HTD), self.padded(key_HTD), self.padded(value_HTD), is_causal=True, scale=scaling,
            dropout_p=dropout, enable_gqa=query_HTD.shape[0] != key_HTD.shape[0],
        )  # fmt: skip
        return self.flat(attended)

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
    return tuple(RowBucket.of(lengths[first:stop], int(starts[first])) for first, stop in pairwise(cuts))


@dataclass(frozen=True)
class PackedGroup:
    """A prompt and the responses to it.

    Attributes:
        span: the prompt's first token, and the one after the last response.
        prompt: the prompt's tokens.
        responses: where the responses lie, counted from the prompt's end; None without a response token.
        mask: bool [tokens, tokens], who sees whom, for a group of at most `MASKED_TOKENS`; None for a larger one.
    """

    span: tuple[int, int]
    prompt: int
    responses: RowBucket | None
    mask: Tensor | None

    @classmethod
    def of(cls, prompt: int, lengths: np.ndarray, start: int) -> PackedGroup:
        """A prompt of some tokens from `start` on, and behind it responses of some lengths, which may be 0."""
        tokens = prompt + int(lengths.sum())
        responses = RowBucket.of(lengths[lengths > 0], 0) if lengths.any() else None
        mask = None
        if responses is not None and tokens <= MASKED_TOKENS:
            segment = torch.from_numpy(np.repeat(np.arange(len(lengths) + 1), [prompt, *lengths]))
            mask = (segment == segment[:, None]) | (segment == 0)
            mask &= torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return cls((start, start + tokens), prompt, responses, mask)

    @property
    def padding(self) -> int:
        """See `PackedPart`."""
        return 0 if self.responses is None or self.mask is not None else self.responses.padding

    def attend(
        self, query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, *, scaling: float | None, dropout: float
    ) -> Tensor:
        """See `PackedPart`; raises ValueError for dropout, under which policy and sampler would differ anyway."""
        if dropout:
            raise ValueError(f"groups do not know attention dropout, and this model has {dropout}")
        grouped, size = query_HTD.shape[0] != key_HTD.shape[0], self.prompt
        if self.mask is not None:
            attended_1HTD = scaled_dot_product_attention(
                query_HTD[None], key_HTD[None], value_HTD[None], attn_mask=self.mask, scale=scaling, enable_gqa=grouped
            )
            return attended_1HTD[0].transpose(0, 1)
        prompt_key, prompt_value = key_HTD[:, :size], value_HTD[:, :size]
        attended_1HPD = scaled_dot_product_attention(
            query_HTD[None, :, :size], prompt_key[None], prompt_value[None], is_causal=True, scale=scaling,
            enable_gqa=grouped,
        )  # fmt: skip
        attended_PHD = attended_1HPD[0].transpose(0, 1)
        if self.responses is None:
            return attended_PHD
        attended_THD = shared_prefix_attention(
            query_HTD[:, size:], key_HTD[:, size:], value_HTD[:, size:], prompt_key, prompt_value, self.responses,
            scaling,
        )  # fmt: skip
        return torch.cat([attended_PHD, attended_THD])

    def to(self, device: torch.device | str) -> PackedGroup:
        """The same on another device."""
        if self.responses is None:
            return self
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, responses=self.responses.to(device), mask=mask)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_parts: Sequence[PackedPart],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, T, D] queries (keys and values of as many heads or fewer) to
    [1, T, heads, D].

    Raises ValueError for a model with a sliding window, which long rows would need a mask for.
    """
    if sliding_window is not None:
        raise ValueError(f"packed sequences do not know sliding windows, and this model has one of {sliding_window}")
    dropout = dropout if module.training else 0.0
    attended = []
    for part in packed_parts:
        start, stop = part.span
        query_HTD, key_HTD, value_HTD = query[0, :, start:stop], key[0, :, start:stop], value[0, :, start:stop]
        attended.append(part.attend(query_HTD, key_HTD, value_HTD, scaling=scaling, dropout=dropout))
    return torch.cat(attended).unsqueeze(0), None


# The model makes no mask for this implementation: the parts say who sees whom.
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
