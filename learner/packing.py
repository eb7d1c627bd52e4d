"""Layouts of training batches: groups that share their prompt, and supervised rows.

A group is laid out once as `[prompt | response 1 | ... | response n]`: every response sees the prompt and itself,
positions restart after the prompt, and the last token of a response, which predicts nothing, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

PADDING = -1


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of L tokens and the T places at which tokens are predicted.

    Attributes:
        input_ids, position_ids: int64 [B, L].
        attention_mask: bool [B, 1, L, L] (who sees whom) or int64 [B, L] (1 for tokens, 0 for padding).
        sequence_T, position_T: int64 [T], the place whose hidden state predicts token t.
        targets_T: int64 [T], the predicted tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    sequence_T: torch.Tensor
    position_T: torch.Tensor
    targets_T: torch.Tensor


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
    """Pad supervised rows (tokens, bool loss mask over the tokens) to one length; the first token is never a target."""
    length = max(len(tokens) for tokens, _ in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    attention = np.zeros((len(rows), length), dtype=np.int64)
    sequence, position, targets = [], [], []
    for row, (tokens, learnt) in enumerate(rows):
        input_ids[row, : len(tokens)], attention[row, : len(tokens)] = tokens, 1
        at = np.nonzero(learnt[1:])[0]
        sequence.append(np.full(len(at), row))
        position.append(at)
        targets.append(np.asarray(tokens, dtype=np.int64)[at + 1])
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.arange(length).expand(len(rows), length),
        torch.from_numpy(attention),
        torch.from_numpy(np.concatenate(sequence)),
        torch.from_numpy(np.concatenate(position)),
        torch.from_numpy(np.concatenate(targets)),
    )


def micro_batches(lengths: Sequence[int] | np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Rows in micro-batches of similar length whose padded size stays within the budget (a longer row goes alone)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]), 1)
        stop = start + max(1, token_budget // width)
        yield order[start:stop]
        start = stop
