"""A catalogue, index and checkpoint small enough to enumerate, for tests on the real engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curriculum.prompts import PromptBuilder
from curriculum.tokenizer import train_tokenizer
from item_index.constraint import AnswerConstraint
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex, assign_semantic_ids
from item_index.tokens import SemanticIdTokens
from item_index.trie import ItemTrie
from learner.policy import build_language_model
from learner.rollouts import RolloutPrompts

TEXTS = [
    "Evidence: mostly drama. Preference: steady drama. Intent: more drama. Recommendation: a drama item.",
    "Rewritten history:",
]


@dataclass(frozen=True)
class Tiny:
    """Everything in memory, and the folders that actors read."""

    index: SemanticIdIndex
    tokenizer: Any
    constraint: AnswerConstraint
    builder: PromptBuilder
    model: Any
    index_folder: Path
    checkpoint: Path

    def prompts(self, modes: list[str], *, budget: int = 48, excluded: list[list[int]] | None = None) -> RolloutPrompts:
        """One prompt per mode with a history of its own; the target is an item after it."""
        items = len(self.index)
        histories = [[(3 * row + step) % items for step in range(4)] for row in range(len(modes))]
        reasoning = np.array([mode == "reasoning" for mode in modes])
        return RolloutPrompts(
            tokens=RaggedArray.of([self.builder.prompt(h, m) for h, m in zip(histories, modes, strict=True)], np.int32),
            targets=np.array([(h[-1] + 1) % items for h in histories], dtype=np.int32),
            reasoning=reasoning,
            budgets=np.where(reasoning, budget, self.index.depth + 1).astype(np.int32),
            excluded=RaggedArray.of(excluded or [[] for _ in modes], np.int32),
        )


def make_index(items: int = 30, level_sizes: tuple[int, ...] = (4, 3, 3, 2), seed: int = 0) -> SemanticIdIndex:
    """Random residual codes with a few collisions."""
    generator = np.random.default_rng(seed)
    codes = np.stack([generator.integers(0, size, items) for size in level_sizes], axis=1).astype(np.int32)
    codes[1] = codes[0]
    codes[2] = codes[0]
    return assign_semantic_ids([f"item-{row}" for row in range(items)], codes, level_sizes, spare_collision_codes=2)


def make_tiny(folder: Path, *, items: int = 30, hidden_size: int = 64, seed: int = 0, sharpen: float = 8.0) -> Tiny:
    """Write index and checkpoint into `folder`; the random head is sharpened, so that no distribution is flat."""
    index = make_index(items, seed=seed)
    index.save(folder / "index")
    tokenizer = train_tokenizer(TEXTS, index, vocabulary_size=300)
    model = build_language_model(tokenizer, hidden_size=hidden_size, layers=2, intermediate_size=96, seed=seed)
    model.get_output_embeddings().weight.data.mul_(sharpen)
    model.save_pretrained(folder / "checkpoint", safe_serialization=True)
    tokenizer.save_pretrained(folder / "checkpoint")
    tokens = SemanticIdTokens.of(tokenizer, index, vocabulary_size=len(tokenizer))
    return Tiny(
        index, tokenizer, AnswerConstraint(ItemTrie.build(index.codes_IL, index.lengths_I), tokens),
        PromptBuilder(tokenizer, index, tokens), model.eval(), folder / "index", folder / "checkpoint",
    )  # fmt: skip
