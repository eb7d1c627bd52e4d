"""The reward actor: reads the answers of a batch of rollouts and scores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from transformers import AutoTokenizer

from item_index.constraint import AnswerConstraint
from item_index.semantic_ids import SemanticIdIndex
from learner.rollouts import RolloutBatch
from learner.srpo import allowed_in
from rewards.answer import parse_answer
from rewards.chains import CHAIN, chain_figures, semantic_ids_in
from rewards.residual import residual_sensitive_reward


@dataclass(frozen=True)
class ScoredResponses:
    """What the rewards say of the responses of a batch; arrays [R], group after group, but for the first.

    Attributes:
        group_sizes: int64 [G], responses of each group.
        rewards: float32, residual-sensitive verifiable reward.
        hits: bool, the answer is the true item, format included.
        valid: bool, the answer is an item of the catalogue.
        well_formed: bool, the response has the required format.
        forced: bool, the closing was forced by the token budget.
        items: int32, row of the answered item, -1 for none.
        lengths: int32, response tokens.
        chains: `rewards.chains.CHAIN`, what the chains are made of, against the history that the prompt shows; zeros in
            direct mode.
    """

    group_sizes: np.ndarray
    rewards: np.ndarray
    hits: np.ndarray
    valid: np.ndarray
    well_formed: np.ndarray
    forced: np.ndarray
    items: np.ndarray
    lengths: np.ndarray
    chains: np.ndarray


class RewardWorker:
    """Scores rollouts against one index; holds a tokenizer to read the chains."""

    def __init__(self, index_folder: str, tokenizer_folder: str, *, minimum_think_tokens: int = 8) -> None:
        self.index = SemanticIdIndex.load(index_folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        self.constraint = AnswerConstraint.of(self.index, self.tokenizer)
        self.minimum_think_tokens = minimum_think_tokens
        self.item_codes = [
            tuple(int(code) for code in codes[:length])
            for codes, length in zip(self.index.codes_IL, self.index.lengths_I, strict=True)
        ]
        self.item_of_codes = {codes: row for row, codes in enumerate(self.item_codes)}

    def score(self, batch: RolloutBatch) -> ScoredResponses:
        """Rewards of every response. Raises ConstraintViolation when a response left the constraint."""
        if batch.index_version != self.index.version:
            raise ValueError(f"rollouts of index {batch.index_version} cannot be scored with {self.index.version}")
        forced_R = allowed_in(batch, self.constraint).forced_R
        rewards, items = np.zeros(len(forced_R), np.float32), np.full(len(forced_R), -1, np.int32)
        well_formed, chains = np.zeros(len(forced_R), bool), np.zeros(len(forced_R), CHAIN)
        special, decode = self.constraint.tokens, self.tokenizer.decode
        shown = [
            set(semantic_ids_in(prompt.tolist(), special)) if reasoning else set()
            for prompt, reasoning in zip(batch.prompts.tokens, batch.prompts.reasoning, strict=True)
        ]
        group_R = batch.group_of_response
        for row, response in enumerate(batch.responses):
            group = int(group_R[row])
            reasoning = bool(batch.prompts.reasoning[group])
            if reasoning:
                chains[row] = chain_figures(response.tolist(), history=shown[group], special=special, decode=decode)
            answer = parse_answer(
                response.tolist(),
                mode="reasoning" if reasoning else "direct",
                special=special,
                decode=decode,
                minimum_think_tokens=self.minimum_think_tokens,
                forced=bool(forced_R[row]),
            )
            if answer.codes is None:
                continue
            truth = self.item_codes[int(batch.prompts.targets[group])]
            items[row] = self.item_of_codes.get(answer.codes, -1)
            well_formed[row] = answer.well_formed
            rewards[row] = residual_sensitive_reward(
                answer.codes, truth, levels=self.index.levels, well_formed=answer.well_formed
            )
        return ScoredResponses(
            group_sizes=batch.group_sizes,
            rewards=rewards,
            hits=well_formed & (items == batch.prompts.targets[group_R]),
            valid=items >= 0,
            well_formed=well_formed,
            forced=forced_R,
            items=items,
            lengths=batch.responses.lengths.astype(np.int32),
            chains=chains,
        )


RewardActor: Any = ray.remote(RewardWorker)
