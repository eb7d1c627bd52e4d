"""A batch of rollouts as flat arrays: what travels through the object store between rollout, reward and learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from item_index.constraint import AllowedTokens, AnswerConstraint
from item_index.ragged import RaggedArray


@dataclass(frozen=True)
class RolloutPrompts:
    """Prompts of G groups and what the allowed sets of their responses depend on.

    Attributes:
        tokens: int32, one row per group.
        targets: int32 [G], row of the true next item.
        reasoning: bool [G], the mode.
        budgets: int32 [G], response tokens at most.
        excluded: int32 item rows that must not be answered, one row per group.
    """

    tokens: RaggedArray
    targets: np.ndarray
    reasoning: np.ndarray
    budgets: np.ndarray
    excluded: RaggedArray

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, groups: np.ndarray) -> RolloutPrompts:
        """Some groups, in the given order."""
        return RolloutPrompts(*(_select(getattr(self, field.name), groups) for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[RolloutPrompts]) -> RolloutPrompts:
        """All groups of all parts."""
        return RolloutPrompts(
            *(_concatenate([getattr(part, field.name) for part in parts]) for field in fields(RolloutPrompts))
        )


@dataclass(frozen=True)
class RolloutBatch:
    """G groups of responses, which lie group after group; groups may differ in size.

    Attributes:
        group_sizes: int64 [G], responses of each group, at least one.
        responses: int32 tokens, one row per response [R], the end of sequence included.
        log_probabilities: float32, the sampler's own (mu), over the allowed sets, beside `responses`.
        weight_versions: int64 [G], version of the weights that sampled the group.
        index_version: version of the semantic-ID index.
    """

    prompts: RolloutPrompts
    group_sizes: np.ndarray
    responses: RaggedArray
    log_probabilities: RaggedArray
    weight_versions: np.ndarray
    index_version: str

    def __post_init__(self) -> None:
        if len(self.group_sizes) != len(self.prompts) or (self.group_sizes < 1).any():
            raise ValueError(f"{len(self.prompts)} groups cannot have the sizes {self.group_sizes.tolist()[:8]}")
        if int(self.group_sizes.sum()) != len(self.responses):
            raise ValueError(f"groups of {int(self.group_sizes.sum())} responses, but there are {len(self.responses)}")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def group_of_response(self) -> np.ndarray:
        """int64 [R]."""
        return np.repeat(np.arange(len(self)), self.group_sizes)

    @property
    def group_starts(self) -> np.ndarray:
        """int64 [G + 1]: the responses of group g are those from `group_starts[g]` to `group_starts[g + 1]`."""
        return np.concatenate([[0], np.cumsum(self.group_sizes)]).astype(np.int64)

    def responses_of(self, group: int) -> list[np.ndarray]:
        """The responses of one group."""
        starts = self.group_starts
        return [self.responses[row] for row in range(int(starts[group]), int(starts[group + 1]))]

    def select(self, groups: np.ndarray) -> RolloutBatch:
        """Some groups with all their responses."""
        rows = RaggedArray(np.arange(len(self.responses)), self.group_starts).select(groups).values
        return RolloutBatch(
            self.prompts.select(groups),
            self.group_sizes[groups],
            self.responses.select(rows),
            self.log_probabilities.select(rows),
            self.weight_versions[groups],
            self.index_version,
        )

    @staticmethod
    def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """All groups of all parts. Raises ValueError when they differ in index version."""
        if len({part.index_version for part in parts}) != 1:
            raise ValueError("rollouts of different index versions cannot be put into one batch")
        return RolloutBatch(
            RolloutPrompts.concatenate([part.prompts for part in parts]),
            np.concatenate([part.group_sizes for part in parts]),
            RaggedArray.concatenate([part.responses for part in parts]),
            RaggedArray.concatenate([part.log_probabilities for part in parts]),
            np.concatenate([part.weight_versions for part in parts]),
            parts[0].index_version,
        )


@dataclass(frozen=True)
class AllowedResponses:
    """What the constraint says of a batch's responses: allowed sets of all tokens, forced closings per response."""

    allowed: AllowedTokens
    forced_R: np.ndarray


def allowed_in(batch: RolloutBatch, constraint: AnswerConstraint) -> AllowedResponses:
    """Recompute the allowed sets of every response token (nothing of them is shipped with the rollouts)."""
    group_R = batch.group_of_response
    prompts = batch.prompts
    states = constraint.start(
        ["reasoning" if prompts.reasoning[group] else "direct" for group in group_R],
        prompts.budgets[group_R],
        [prompts.excluded[int(group)] for group in group_R],
    )
    return AllowedResponses(constraint.scan(batch.responses, states), states.forced)


def in_answer(batch: RolloutBatch, constraint: AnswerConstraint) -> np.ndarray:
    """bool [tokens], beside `batch.responses.values`: behind its response's `<answer>`, which direct mode has not."""
    opens_T = batch.responses.values == constraint.tokens.answer_open
    opened_T = np.cumsum(opens_T)
    before_R = np.concatenate([[0], opened_T])[batch.responses.offsets[:-1]]
    return (opened_T > np.repeat(before_R, batch.responses.lengths)) & ~opens_T


def true_answers(batch: RolloutBatch, constraint: AnswerConstraint) -> RolloutBatch:
    """The reasoning groups with one response each: the chain of a group's first response, and behind it the true item
    in the place of the answer that was sampled. Nobody sampled these: their log-probabilities are 0.

    The rollouts must have been sampled under the constraint, so that every chain opens an answer.
    """
    groups, tokens = np.flatnonzero(batch.prompts.reasoning), constraint.tokens
    responses = []
    for group, path in zip(groups, constraint.trie.paths(batch.prompts.targets[groups]), strict=True):
        sampled = batch.responses[int(batch.group_starts[group])]
        chain = sampled[: int(np.flatnonzero(sampled == tokens.answer_open)[0]) + 1]
        item = constraint.node_token(path[path >= 0])
        responses.append([*chain, *item, tokens.answer_close, tokens.end_of_sequence])
    rows = RaggedArray.of(responses, np.int32)
    return RolloutBatch(
        batch.prompts.select(groups), np.ones(len(groups), np.int64), rows,
        RaggedArray(np.zeros(len(rows.values), np.float32), rows.offsets), batch.weight_versions[groups],
        batch.index_version,
    )  # fmt: skip


def _select(field: Any, rows: np.ndarray) -> Any:
    return field.select(rows) if isinstance(field, RaggedArray) else field[rows]


def _concatenate(parts: Sequence[Any]) -> Any:
    return RaggedArray.concatenate(parts) if isinstance(parts[0], RaggedArray) else np.concatenate(parts)
