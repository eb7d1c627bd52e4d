"""A catalogue, index and checkpoint small enough to enumerate, for tests on the real engines."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from curriculum.prompts import PromptBuilder
from curriculum.tokenizer import train_tokenizer
from item_index.constraint import AnswerConstraint, ConstraintStates, Phase
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex, assign_semantic_ids
from item_index.tokens import SemanticIdTokens
from item_index.trie import ItemTrie
from learner.packed_attention import PACKED
from learner.policy import Policy, build_language_model
from learner.rollouts import RolloutBatch, RolloutPrompts

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

    def prompts(
        self, modes: Sequence[str], *, budget: int = 48, excluded: list[list[int]] | None = None,
        rows: Sequence[int] | None = None,
    ) -> RolloutPrompts:  # fmt: skip
        """One prompt per mode with a history of its own, that of its row; the target is an item after it."""
        items = len(self.index)
        rows = range(len(modes)) if rows is None else rows
        histories = [[(3 * row + step) % items for step in range(4)] for row in rows]
        reasoning = np.array([mode == "reasoning" for mode in modes])
        return RolloutPrompts(
            tokens=RaggedArray.of([self.builder.prompt(h, m) for h, m in zip(histories, modes, strict=True)], np.int32),
            targets=np.array([(h[-1] + 1) % items for h in histories], dtype=np.int32),
            reasoning=reasoning,
            budgets=np.where(reasoning, budget, self.index.depth + 1).astype(np.int32),
            excluded=RaggedArray.of(excluded or [[] for _ in modes], np.int32),
        )

    def random_rollouts(self, prompts: RolloutPrompts, *, responses: int | Sequence[int], seed: int) -> RolloutBatch:
        """Responses drawn at random from the allowed tokens, without a model; structure and item tokens are drawn more
        often than words, so that all phases occur. `responses` are those of every group, or of each."""
        generator = np.random.default_rng(seed)
        sizes = np.broadcast_to(responses, len(prompts)).astype(np.int64)
        sampled = [
            self._random_response(prompts, group, generator) for group, size in enumerate(sizes) for _ in range(size)
        ]
        return RolloutBatch(
            prompts=prompts,
            group_sizes=sizes,
            responses=RaggedArray.of(sampled, np.int32),
            log_probabilities=RaggedArray.of([np.zeros(len(tokens)) for tokens in sampled], np.float32),
            weight_versions=np.zeros(len(prompts), dtype=np.int64),
            index_version=self.index.version,
        )

    def _random_response(self, prompts: RolloutPrompts, group: int, generator: np.random.Generator) -> list[int]:
        states = self.constraint.start(
            ["reasoning" if prompts.reasoning[group] else "direct"],
            [int(prompts.budgets[group])],
            [prompts.excluded[group]],
        )
        tokens, response = self.constraint.tokens, []
        special = {tokens.think_close, tokens.answer_open, *(int(t) for level in tokens.code_tokens for t in level)}
        while states.phase[0] != Phase.DONE:
            allowed = allowed_tokens(self.constraint, states)
            rare = sorted(allowed & special)
            chosen = int(generator.choice(rare if rare and generator.random() < 0.4 else sorted(allowed)))
            self.constraint.advance(states, np.array([chosen]))
            response.append(chosen)
        return response


def policy_of(model: Any) -> Policy:
    """A policy with a copy of the model."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(PACKED)
    return Policy(model)


def allowed_tokens(constraint: AnswerConstraint, states: ConstraintStates) -> set[int]:
    """The allowed next tokens of the first state, one by one."""
    allowed = constraint.allowed(states)
    tokens = set(allowed.listed[0].tolist())
    if allowed.free_text[0] >= 0:
        tokens |= set(np.nonzero(constraint.free_text_masks[allowed.free_text[0]])[0].tolist())
    return tokens


def make_index(items: int = 30, level_sizes: tuple[int, ...] = (4, 3, 3, 2), seed: int = 0) -> SemanticIdIndex:
    """Random residual codes with a few collisions."""
    generator = np.random.default_rng(seed)
    codes = np.stack([generator.integers(0, size, items) for size in level_sizes], axis=1).astype(np.int32)
    codes[1] = codes[0]
    codes[2] = codes[0]
    return assign_semantic_ids([f"item-{row}" for row in range(items)], codes, level_sizes, spare_collision_codes=2)


def with_newcomers(index: SemanticIdIndex, rows: tuple[int, ...]) -> SemanticIdIndex:
    """Two more items per row, below the row's own codes: that item is now the beginning of others."""
    codes = [index.codes_IL[row].copy() for row in rows for _ in range(2)]
    for number, code in enumerate(codes):
        assert code[index.levels] == -1, "the row has a collision code already"
        code[index.levels] = number % 2
    return replace(
        index,
        item_ids=(*index.item_ids, *(f"newcomer-{number}" for number in range(len(codes)))),
        codes_IL=np.concatenate([index.codes_IL, np.stack(codes)]),
        lengths_I=np.concatenate([index.lengths_I, np.full(len(codes), index.levels + 1, dtype=index.lengths_I.dtype)]),
    )


def make_tiny(
    folder: Path, *, items: int = 30, hidden_size: int = 64, seed: int = 0, sharpen: float = 8.0, tied: bool = False
) -> Tiny:
    """Write index and checkpoint into `folder`; the random head is sharpened, so that no distribution is flat."""
    index = with_newcomers(make_index(items, seed=seed), (5, 9))
    index.save(folder / "index")
    tokenizer = train_tokenizer(TEXTS, index, vocabulary_size=300)
    model = build_language_model(tokenizer, hidden_size=hidden_size, layers=2, intermediate_size=96, seed=seed)
    model.get_output_embeddings().weight.data.mul_(sharpen)
    if tied:
        model.config.tie_word_embeddings = True
        model.get_input_embeddings().weight.data.copy_(model.get_output_embeddings().weight.data)
        model.tie_weights()
    model.save_pretrained(folder / "checkpoint", safe_serialization=True)
    tokenizer.save_pretrained(folder / "checkpoint")
    tokens = SemanticIdTokens.of(tokenizer, index, vocabulary_size=len(tokenizer))
    return Tiny(
        index, tokenizer, AnswerConstraint(ItemTrie.build(index.codes_IL, index.lengths_I), tokens),
        PromptBuilder(tokenizer, index, tokens), model.eval(), folder / "index", folder / "checkpoint",
    )  # fmt: skip
