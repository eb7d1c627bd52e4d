"""A batch of rollouts as flat arrays: what travels through the object store between rollout, reward and learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

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
    """G groups of N responses each; response r belongs to group r // N.

    Attributes:
        responses: int32 tokens, one row per response [G * N], the end of sequence included.
        log_probabilities: float32, the sampler's own (mu), over the allowed sets, beside `responses`.
        weight_versions: int64 [G], version of the weights that sampled the group.
        index_version: version of the semantic-ID index.
    """

    prompts: RolloutPrompts
    responses: RaggedArray
    log_probabilities: RaggedArray
    weight_versions: np.ndarray
    index_version: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        """N, responses per group."""
        return len(self.responses) // max(len(self.prompts), 1)

    def select(self, groups: np.ndarray) -> RolloutBatch:
        """Some groups with all their responses."""
        rows = (np.asarray(groups, dtype=np.int64)[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)
        return RolloutBatch(
            self.prompts.select(groups),
            self.responses.select(rows),
            self.log_probabilities.select(rows),
            self.weight_versions[groups],
            self.index_version,
        )

    @staticmethod
    def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """All groups of all parts. Raises ValueError when they differ in index version or group size."""
        if len({part.index_version for part in parts}) != 1 or len({part.group_size for part in parts}) != 1:
            raise ValueError("rollouts of different index versions or group sizes cannot be put into one batch")
        return RolloutBatch(
            RolloutPrompts.concatenate([part.prompts for part in parts]),
            RaggedArray.concatenate([part.responses for part in parts]),
            RaggedArray.concatenate([part.log_probabilities for part in parts]),
            np.concatenate([part.weight_versions for part in parts]),
            parts[0].index_version,
        )


def _select(field: Any, rows: np.ndarray) -> Any:
    return field.select(rows) if isinstance(field, RaggedArray) else field[rows]


def _concatenate(parts: Sequence[Any]) -> Any:
    return RaggedArray.concatenate(parts) if isinstance(parts[0], RaggedArray) else np.concatenate(parts)
