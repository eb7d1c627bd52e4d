"""Layouts of training batches: groups that share their prompt, and supervised rows.

A group is laid out once as `[prompt | response 1 | ... | response n]`: every response sees the prompt and itself,
positions restart after the prompt, and the last token of a response, which predicts nothing, is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from learner.row_attention import RowBucket, row_buckets

PADDING = -1


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of L tokens and the T places at which tokens are predicted.

    Attributes:
        input_ids, position_ids: int64 [B, L].
        attention_mask: bool [B, 1, L, L], who sees whom; None for packed rows.
        sequence_T, position_T: int64 [T], the place whose hidden state predicts token t.
        targets_T: int64 [T], the predicted tokens.
        rows: buckets of packed rows, which see themselves alone; None for groups.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    sequence_T: torch.Tensor
    position_T: torch.Tensor
    targets_T: torch.Tensor
    rows: tuple[RowBucket, ...] | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same on another device."""
        if torch.device(device).type == "cpu":
            return self
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        rows = None if self.rows is None else tuple(bucket.to(device) for bucket in self.rows)
        return replace(self, **moved, rows=rows)


def packed_length(prompt: np.ndarray, responses: Sequence[np.ndarray]) -> int:
    """Tokens of a group in the packed layout."""
    return len(prompt) + sum(len(response) - 1 for response in responses)


def pack_groups(groups: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]) -> PackedBatch:
    """Pack groups (prompt, responses), one sequence each; targets are in the order of groups, responses, tokens."""
    length = max(packed_length(prompt, responses) for prompt, responses in groups)
    input_ids = np.zeros((len(groups), length), dtype=np.int64)
    position_ids = np.zeros((len(groups), length), dtype=np.int64)
    segments = np.full((len(groups), length), PADDING, dtype=np.int64)  # 0 prompt, i response i
    sequence, position, targets = [], [], []
    for row, (prompt, responses) in enumerate(groups):
        end = len(prompt)
        input_ids[row, :end], position_ids[row, :end], segments[row, :end] = prompt, np.arange(end), 0
        for number, response in enumerate(responses, start=1):
            kept = len(response) - 1
            input_ids[row, end : end + kept] = response[:-1]
            position_ids[row, end : end + kept] = len(prompt) + np.arange(kept)
            segments[row, end : end + kept] = number
            sequence.append(np.full(len(response), row))
            position.append(np.concatenate([[len(prompt) - 1], end + np.arange(kept)]))
            targets.append(np.asarray(response, dtype=np.int64))
            end += kept
    segment = torch.from_numpy(segments)
    queries, keys = segment[:, :, None], segment[:, None, :]
    mask = (keys == queries) | ((keys == 0) & (queries != PADDING))  # padding sees padding: no empty softmax
    mask &= torch.ones(length, length, dtype=torch.bool).tril()
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        mask[:, None],
        torch.from_numpy(np.concatenate(sequence)),
        torch.from_numpy(np.concatenate(position)),
        torch.from_numpy(np.concatenate(targets)),
    )


def pack_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> PackedBatch:
    """Lay supervised rows (tokens, bool loss mask over the tokens) one after the other, the longest first.

    No row attends to another, positions restart with each, and there is no padding. The first token of a row is never
    a target. Targets are in the order of the layout. The model must have `PACKED_ROWS` attention.
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
        None,
        torch.zeros(len(targets_at), dtype=torch.int64),
        torch.from_numpy(targets_at - 1),
        torch.from_numpy(tokens_T[targets_at]),
        row_buckets(lengths),
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


def micro_batches(lengths: Sequence[int] | np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Rows in micro-batches of similar length whose padded size stays within the budget (a longer row goes alone)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]), 1)
        stop = start + max(1, token_budget // width)
        yield order[start:stop]
        start = stop
