"""Prompts for rollouts: of held-out train targets for SRPO, of validation or test targets for probes and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from curriculum.corpus import Corpus
from curriculum.rows import places_in_sequence, train_positions
from item_index.constraint import Mode
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutPrompts

Part = Literal["validation", "test"]


class PromptSource:
    """Builds prompts for places in the users' sequences."""

    def __init__(self, corpus: Corpus, *, reasoning_budget: int, exclude_seen: bool) -> None:
        self.corpus = corpus
        self.reasoning_budget = reasoning_budget
        self.direct_budget = corpus.index.depth + 1
        self.exclude_seen = exclude_seen
        self.places = places_in_sequence(corpus.sequences)

    def prompts(self, positions: np.ndarray, modes: Sequence[Mode]) -> RolloutPrompts:
        """Prompts whose targets stand at `positions` of the sequences' flat items, in the given modes."""
        items, builder = self.corpus.sequences.items, self.corpus.builder
        seen = [items[at - self.places[at] : at] for at in positions]
        reasoning = np.array([mode == "reasoning" for mode in modes], dtype=bool)
        return RolloutPrompts(
            tokens=RaggedArray.of(
                [builder.prompt(history, mode) for history, mode in zip(seen, modes, strict=True)], np.int32
            ),
            targets=items[positions].astype(np.int32),
            reasoning=reasoning,
            budgets=np.where(reasoning, self.reasoning_budget, self.direct_budget).astype(np.int32),
            excluded=RaggedArray.of(seen if self.exclude_seen else [[] for _ in seen], np.int32),
        )

    def reinforcement_positions(self, minimum_history: int) -> np.ndarray:
        """int64: held-out train targets, or every train target with enough history where none was held out."""
        held_out = self.corpus.held_out
        if held_out.any():
            return np.nonzero(held_out)[0]
        return np.nonzero(train_positions(self.corpus.sequences) & (self.places >= minimum_history))[0]

    def evaluation_positions(self, part: Part) -> np.ndarray:
        """int64 [users]: each user's validation or test target."""
        return self.corpus.sequences.offsets_U1[1:] - (1 if part == "test" else 2)
