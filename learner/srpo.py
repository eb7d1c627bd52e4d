"""Sparse-Regularized Group Policy Optimization: one step's update from a batch of scored rollouts (section 3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from item_index.constraint import AllowedTokens, AnswerConstraint
from learner.engine import LearnerEngine
from learner.objective import ObjectiveSettings, token_losses, token_weights
from learner.packing import balanced_micro_batches, pack_groups, packed_length
from learner.policy import Policy
from learner.rollouts import RolloutBatch


@dataclass(frozen=True)
class AllowedResponses:
    """What the constraint says of a batch's responses: allowed sets of all tokens, forced closings per response."""

    allowed: AllowedTokens
    forced_R: np.ndarray


def allowed_in(batch: RolloutBatch, constraint: AnswerConstraint) -> AllowedResponses:
    """Recompute the allowed sets of every response token (nothing of them is shipped with the rollouts)."""
    group_R = np.repeat(np.arange(len(batch)), batch.group_size)
    prompts = batch.prompts
    states = constraint.start(
        ["reasoning" if prompts.reasoning[group] else "direct" for group in group_R],
        prompts.budgets[group_R],
        [prompts.excluded[int(group)] for group in group_R],
    )
    return AllowedResponses(constraint.scan(batch.responses, states), states.forced)


def response_log_probabilities(
    policy: torch.nn.Module,
    batch: RolloutBatch,
    allowed: AllowedTokens,
    free_text_masks: torch.Tensor,
    *,
    temperature: float,
    micro_batch_tokens: int,
) -> torch.Tensor:
    """float32 [tokens], beside `batch.responses.values`; no gradient."""
    result = torch.zeros(len(batch.responses.values))
    policy.eval()
    with torch.inference_mode():
        for groups in _micro_batches(batch, micro_batch_tokens):
            packed, tokens = _pack(batch, groups)
            result[tokens] = policy(packed, allowed.select(tokens), free_text_masks, temperature)
    return result.clone()


def _micro_batches(batch: RolloutBatch, token_budget: int) -> list[np.ndarray]:
    """Groups by micro-batch, which hold about the same number of packed tokens."""
    n = batch.group_size
    lengths = [
        packed_length(batch.prompts.tokens[g], [batch.responses[g * n + i] for i in range(n)])
        for g in range(len(batch))
    ]
    plan = balanced_micro_batches(lengths, ranks=1, token_budget=token_budget)[0]
    return [groups for groups in plan if len(groups)]


def _pack(batch: RolloutBatch, groups: np.ndarray):
    """The packed groups and the places of their tokens in `batch.responses.values`, in the same order."""
    n = batch.group_size
    packed = pack_groups(
        [(batch.prompts.tokens[int(g)], [batch.responses[int(g) * n + i] for i in range(n)]) for g in groups]
    )
    offsets = batch.responses.offsets
    return packed, np.concatenate([np.arange(offsets[g * n], offsets[(g + 1) * n]) for g in groups])


class GroupPolicyLearner:
    """The policy under training, its frozen reference, and the constraint under which both are read."""

    def __init__(
        self,
        engine: LearnerEngine,
        reference: Policy,
        constraint: AnswerConstraint,
        objective: ObjectiveSettings,
        *,
        temperature: float,
        mini_batch_prompts: int,
        micro_batch_tokens: int,
        seed: int,
    ) -> None:
        self.engine = engine
        self.reference = reference.requires_grad_(False)
        self.constraint = constraint
        self.objective = objective
        self.temperature = temperature
        self.mini_batch_prompts = mini_batch_prompts
        self.micro_batch_tokens = micro_batch_tokens
        self.generator = np.random.default_rng(seed)
        self.free_text_masks = torch.from_numpy(constraint.free_text_masks)

    def log_probabilities(self, policy: torch.nn.Module, batch: RolloutBatch, allowed: AllowedTokens) -> torch.Tensor:
        """See `response_log_probabilities`."""
        return response_log_probabilities(
            policy, batch, allowed, self.free_text_masks,
            temperature=self.temperature, micro_batch_tokens=self.micro_batch_tokens,
        )  # fmt: skip

    def update(self, batch: RolloutBatch, advantages_R: np.ndarray) -> dict[str, float]:
        """Every mini-batch of the step once; returns token means of the diagnostics over positions with a choice."""
        allowed = allowed_in(batch, self.constraint).allowed
        reference_T = self.log_probabilities(self.reference, batch, allowed)
        order = self.generator.permutation(len(batch))
        mini_batches = [order[i : i + self.mini_batch_prompts] for i in range(0, len(order), self.mini_batch_prompts)]
        # On policy with one mini-batch the old values are the current ones, detached: no pass of their own.
        old_T = self.log_probabilities(self.engine.policy, batch, allowed) if len(mini_batches) > 1 else None

        metrics: dict[str, list[float]] = defaultdict(list)
        for groups in mini_batches:
            for name, value in self._mini_batch(batch.select(groups), groups, batch, advantages_R, allowed,
                                                reference_T, old_T).items():  # fmt: skip
                metrics[name].append(value)
        return {name: float(np.mean(values)) for name, values in metrics.items()}

    def _mini_batch(
        self,
        mini: RolloutBatch,
        groups: np.ndarray,
        batch: RolloutBatch,
        advantages_R: np.ndarray,
        allowed: AllowedTokens,
        reference_T: torch.Tensor,
        old_T: torch.Tensor | None,
    ) -> dict[str, float]:
        n = batch.group_size
        offsets = batch.responses.offsets
        tokens_of_mini = np.concatenate([np.arange(offsets[g * n], offsets[(g + 1) * n]) for g in groups])
        mini_allowed = allowed.select(tokens_of_mini)
        responses_of_mini = (groups[:, None] * n + np.arange(n)).reshape(-1)
        lengths = mini.responses.lengths
        advantage_T = torch.from_numpy(np.repeat(advantages_R[responses_of_mini], lengths)).float()
        mode_T = torch.from_numpy(np.repeat(np.repeat(mini.prompts.reasoning, n), lengths).astype(np.int64))
        has_choice_T = torch.from_numpy(mini_allowed.has_choice)
        reasoning_share = float(mini.prompts.reasoning.mean())
        weights_T = token_weights(
            mode_T, has_choice_T, (1 - reasoning_share, reasoning_share), self.objective.token_mean
        )
        sampler_T = torch.from_numpy(np.array(mini.log_probabilities.values))
        plan = _micro_batches(mini, self.micro_batch_tokens)
        sums: dict[str, float] = defaultdict(float)
        self.engine.engine.train()

        def losses() -> Iterator[torch.Tensor]:
            for rows in plan:
                packed, at = _pack(mini, rows)
                current = self.engine.policy(packed, mini_allowed.select(at), self.free_text_masks, self.temperature)
                old = current.detach() if old_T is None else old_T[tokens_of_mini[at]]
                loss_T, diagnostics = token_losses(
                    current, old, sampler_T[at], reference_T[tokens_of_mini[at]], advantage_T[at], self.objective
                )
                loss = (weights_T[at] * loss_T).sum()
                sums["loss"] += loss.item()
                chosen = has_choice_T[at]
                for name, values in diagnostics.items():
                    sums[name] += values[chosen].sum().item()
                difference = old[chosen] - sampler_T[at][chosen]
                sums["sampler_ratio"] += difference.exp().sum().item()
                sums["sampler_gap_maximum"] = max(sums["sampler_gap_maximum"], difference.abs().max().item())
                sums["entropy_estimate"] -= current.detach()[chosen].sum().item()
                yield loss

        norm = self.engine.step(losses(), len(plan))
        count = max(int(has_choice_T.sum()), 1)
        whole = {"loss", "sampler_gap_maximum"}
        metrics = {name: value if name in whole else value / count for name, value in sums.items()}
        return {**metrics, "gradient_norm": norm, "learning_rate": self.engine.learning_rate}
