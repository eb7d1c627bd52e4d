"""Layouts of training batches: groups that share their prompt, and supervised rows.

All sequences of a batch lie one after the other without padding; `learner.packed_attention` says who sees whom. A group
is laid out once as `[prompt | response 1 | ... | response n]`: every response sees the prompt and itself, positions
restart after the prompt, and the last token of a response, which predicts nothing, is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learner.packed_attention import PackedGroup, PackedPart, row_buckets

# Two tokens, of which one is predicted: for ranks that have nothing of their own in a micro-batch.
PLACEHOLDER = (np.zeros(2, dtype=np.int32), np.array([False, True]))


@dataclass(frozen=True)
class PackedBatch:
    """L tokens of packed sequences and the T places at which tokens are predicted.

    Attributes:
        input_ids, position_ids: int64 [1, L].
        parts: rows or groups, each of which attends within itself; together they are all tokens in their order.
        position_T: int64 [T], the place whose hidden state predicts token t.
        targets_T: int64 [T], the predicted tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    parts: tuple[PackedPart, ...]
    position_T: torch.Tensor
    targets_T: torch.Tensor

    @property
    def attended_places(self) -> int:
        """Tokens and the padding beside them in attention; nothing else is padded."""
        return self.input_ids.numel() + sum(part.padding for part in self.parts)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same on another device."""
        if torch.device(device).type == "cpu":
            return self
        return PackedBatch(
            self.input_ids.to(device), self.position_ids.to(device), tuple(part.to(device) for part in self.parts),
            self.position_T.to(device), self.targets_T.to(device),
        )  # fmt: skip


def packed_length(prompt: np.ndarray, responses: Sequence[np.ndarray]) -> int:
    """Tokens of a group in the packed layout."""
    return len(prompt) + sum(len(response) - 1 for response in responses)


def pack_groups(groups: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]) -> PackedBatch:
    """Pack groups (prompt, responses) of any sizes; targets are in the order of groups, responses, tokens.

    Raises ValueError that names the group and the response where one is empty.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predicted_at: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    parts: list[PackedGroup] = []
    start = 0
    for number, (prompt, responses) in enumerate(groups):
        kept = np.array([len(response) - 1 for response in responses], dtype=np.int64)
        if len(prompt) == 0 or (kept < 0).any():
            what = "the prompt" if len(prompt) == 0 else f"response {int(np.argmax(kept < 0))}"
            raise ValueError(f"group {number}: {what} is empty")
        ends = start + len(prompt) + np.cumsum(kept)
        tokens += [prompt, *(response[:-1] for response in responses)]
        positions += [np.arange(len(prompt)), *(len(prompt) + np.arange(length) for length in kept)]
        for response, length, end in zip(responses, kept, ends, strict=True):
            predicted_at += [np.array([start + len(prompt) - 1]), np.arange(end - length, end)]
            targets.append(response)
        parts.append(PackedGroup.of(len(prompt), kept, start))
        start = int(ends[-1])
    return PackedBatch(
        torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None],
        torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        tuple(parts),
        torch.from_numpy(np.concatenate(predicted_at).astype(np.int64)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    )


def pack_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> PackedBatch:
    """Lay supervised rows (tokens, bool loss mask over the tokens) one after the other, the longest first.

    No row attends to another, positions restart with each, and there is no padding. The first token of a row is never
    a target. Targets are in the order of the layout.
    """
    ordered = sorted(rows, key=lambda row: -len(row[0]))
    lengths = np.array([len(tokens) for tokens, _ in ordered])
    tokens_T = np.concatenate([tokens for tokens, _ in ordered]).astype(np.int64)
    learnt_T = np.concatenate([learnt for _, learnt in ordered])
    starts = np.cumsum(lengths) - lengths
    learnt_T[starts] = False
    targets_at = np.flatnonzero(learnt_T)
    positions = np.arange(len(tokens_T)) - np.repeat(starts, lengths)
    return PackedBatch(
        torch.from_numpy(tokens_T)[None],
        torch.from_numpy(positions)[None],
        row_buckets(lengths),
        torch.from_numpy(targets_at - 1),
        torch.from_numpy(tokens_T[targets_at]),
    )


def balanced_micro_batches(
    lengths: Sequence[int] | np.ndarray, *, ranks: int, token_budget: int
) -> list[list[np.ndarray]]:
    """Rows shared out to ranks and micro-batches: `result[rank][number]` are int64 row numbers, in rising order.

    All ranks get the same number of micro-batches, as few as the budget allows, with about the same number of tokens:
    each row, the longest first, goes where the fewest tokens are. A row longer than the budget is alone in its
    micro-batch or with rows that other micro-batches have no room for. Where there are fewer rows than places, some
    micro-batches are empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable").tolist()
    count = max(1, -(-int(lengths.sum()) // (ranks * token_budget)))
    while True:
        places = ranks * count
        members: list[list[int]] = [[] for _ in range(places)]
        lightest = [(0, place) for place in range(places)]
        for row in order:
            tokens, place = heapq.heappop(lightest)
            members[place].append(row)
            heapq.heappush(lightest, (tokens + int(lengths[row]), place))
        over = [place for tokens, place in lightest if tokens > token_budget and len(members[place]) > 1]
        if not over:
            break
        count += 1
    batches = [np.sort(np.array(rows, dtype=np.int64)) for rows in members]
    return [batches[rank::ranks] for rank in range(ranks)]
