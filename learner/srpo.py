"""Sparse-Regularized Group Policy Optimization: one step's update from a batch of scored rollouts (section 3).

Every rank holds the whole batch and works on its share: the groups of a mini-batch are spread over ranks and
micro-batches so that all have about the same number of tokens. Token weights are made for the mini-batch as a whole,
so the gradients of all shares add up to that of the mini-batch, however it was spread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from item_index.constraint import AllowedTokens, AnswerConstraint
from learner.diagnostics import Diagnostics
from learner.engine import LearnerEngine
from learner.low_rank import without_low_rank_weights
from learner.objective import ObjectiveSettings, token_losses, token_weights
from learner.packing import PLACEHOLDER, PackedBatch, balanced_micro_batches, pack_groups, pack_rows, packed_length
from learner.policy import Policy
from learner.rollouts import RolloutBatch, allowed_in, in_answer, true_answers


@dataclass
class MicroBatch:
    """Groups of one forward pass. Axis T: their response tokens, which stand at `at_T` in `batch.responses.values`.

    `reference_T` and `old_T` are log-probabilities; None until they are computed, and `old_T` also where the policy is
    still the one that the step began with, so that the current values, detached, are the old ones.
    """

    packed: PackedBatch
    at_T: np.ndarray
    allowed: AllowedTokens
    reference_T: Tensor | None = None
    old_T: Tensor | None = None


def micro_batch(batch: RolloutBatch, groups: np.ndarray, allowed: AllowedTokens) -> MicroBatch:
    """Some groups of a batch; `allowed` are the allowed sets of all tokens of the batch."""
    packed = pack_groups([(batch.prompts.tokens[int(group)], batch.responses_of(int(group))) for group in groups])
    first = batch.responses.offsets[batch.group_starts]
    at_T = np.concatenate([np.arange(first[group], first[group + 1]) for group in groups])
    return MicroBatch(packed, at_T, allowed.select(at_T))


def shares(batch: RolloutBatch, groups: np.ndarray, *, ranks: int, token_budget: int) -> list[list[np.ndarray]]:
    """Groups by rank and micro-batch; every rank has the same number of micro-batches, some of which may be empty."""
    lengths = [packed_length(batch.prompts.tokens[int(group)], batch.responses_of(int(group))) for group in groups]
    plan = balanced_micro_batches(lengths, ranks=ranks, token_budget=token_budget)
    return [[groups[places] for places in of_rank] for of_rank in plan]


def response_log_probabilities(
    policy: torch.nn.Module, batch: RolloutBatch, allowed: AllowedTokens, free_text_masks: Tensor, *,
    temperature: float, micro_batch_tokens: int,
) -> Tensor:  # fmt: skip
    """float32 [tokens], beside `batch.responses.values`; no gradient."""
    result = torch.zeros(len(batch.responses.values))
    policy.eval()
    with torch.no_grad():  # not inference mode: ZeRO 3 keeps parameters that it gathers
        for groups in shares(batch, np.arange(len(batch)), ranks=1, token_budget=micro_batch_tokens)[0]:
            if len(groups):
                part = micro_batch(batch, groups, allowed)
                result[part.at_T] = policy(part.packed, part.allowed, free_text_masks, temperature)
    return result


class GroupPolicyLearner:
    """The policy under training, its frozen reference, and the constraint under which both are read.

    Args:
        reference: the frozen reference; None is the policy without its low-rank weights.
        mini_batch_prompts: groups of one optimizer step, of all ranks together.
        micro_batch_tokens: packed tokens of one forward pass of a rank at most; a longer group goes alone.
        epochs: how often a step goes through its mini-batches, each time in a new order.
        measure_valid_mass: report the valid mass, which costs the whole output head inside semantic IDs.
    """

    def __init__(
        self, engine: LearnerEngine, reference: Policy | None, constraint: AnswerConstraint,
        objective: ObjectiveSettings, *, temperature: float, mini_batch_prompts: int, micro_batch_tokens: int,
        seed: int, epochs: int = 1, measure_valid_mass: bool = False,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.reference = None if reference is None else reference.requires_grad_(False).to(engine.device).eval()
        self.constraint = constraint
        self.objective = objective
        self.temperature = temperature
        self.mini_batch_prompts = mini_batch_prompts
        self.micro_batch_tokens = micro_batch_tokens
        self.epochs = epochs
        self.valid_mass = measure_valid_mass or objective.valid_mass_coefficient > 0
        self.generator = np.random.default_rng(seed)
        self.free_text_masks = torch.from_numpy(constraint.free_text_masks).to(engine.device)

    def update(self, batch: RolloutBatch, advantages_R: np.ndarray) -> dict[str, float]:
        """All mini-batches of the step, `epochs` times; every rank calls this with the same batch.

        Returns means over the optimizer steps of the token means of the diagnostics, over positions with a choice.
        """
        started = time.perf_counter()
        self.engine.engine.eval()
        allowed = allowed_in(batch, self.constraint).allowed
        order = self.generator.permutation(len(batch))
        mini_batches = [order[i : i + self.mini_batch_prompts] for i in range(0, len(order), self.mini_batch_prompts)]
        parts_of = [self._own_parts(batch, groups, allowed) for groups in mini_batches]
        on_policy = len(mini_batches) == self.epochs == 1
        with torch.no_grad():  # not inference mode: ZeRO 3 keeps parameters that it gathers
            for part in (part for parts in parts_of for part in parts if part is not None):
                part.reference_T = self._reference(part)
                if not on_policy:
                    part.old_T = self._log_probabilities(self.engine.policy, part)
        prepared = time.perf_counter()

        steps = []
        for _epoch in range(self.epochs):
            for number in self.generator.permutation(len(mini_batches)):
                steps.append(self._step(batch, mini_batches[number], parts_of[number], allowed, advantages_R))
        ended = time.perf_counter()
        of_rank = [None if part is None else part.packed for parts in parts_of for part in parts]
        tokens, places = self.engine.totals(
            [
                float(sum(packed.input_ids.numel() for packed in of_rank if packed is not None)),
                float(sum(len(PLACEHOLDER[0]) if packed is None else packed.attended_places for packed in of_rank)),
            ]
        )
        metrics = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        return {
            **metrics,
            "skipped_steps": float(sum(step["skipped"] for step in steps)),
            "tokens_per_second": self.epochs * tokens / (ended - prepared),
            "padding_share": 1 - tokens / places,
            "seconds/old_and_reference": prepared - started,
            "seconds/steps": ended - prepared,
        }

    def _own_parts(self, batch: RolloutBatch, groups: np.ndarray, allowed: AllowedTokens) -> list[MicroBatch | None]:
        """This rank's micro-batches of a mini-batch; None for an empty one."""
        plan = shares(batch, groups, ranks=self.engine.ranks, token_budget=self.micro_batch_tokens)[self.engine.rank]
        parts = [micro_batch(batch, own, allowed) if len(own) else None for own in plan]
        for part in parts:
            if part is not None:
                part.packed = part.packed.to(self.engine.device)
        return parts

    def _log_probabilities(self, policy: torch.nn.Module, part: MicroBatch) -> Tensor:
        """float32 [T] under a policy."""
        return policy(part.packed, part.allowed, self.free_text_masks, self.temperature)

    def _reference(self, part: MicroBatch) -> Tensor:
        """float32 [T] under the reference."""
        if self.reference is not None:
            return self._log_probabilities(self.reference, part)
        with without_low_rank_weights(self.engine.engine.module):
            return self._log_probabilities(self.engine.policy, part)

    def _step(
        self, batch: RolloutBatch, groups: np.ndarray, parts: list[MicroBatch | None], allowed: AllowedTokens,
        advantages_R: np.ndarray,
    ) -> dict[str, float]:  # fmt: skip
        """One optimizer step on a mini-batch; returns its diagnostics."""
        lengths_R, device = batch.responses.lengths, self.engine.device
        in_mini_T = np.isin(np.repeat(batch.group_of_response, lengths_R), groups)
        weights = self._token_weights(batch, groups, in_mini_T, allowed)
        constrained = int((in_mini_T & (allowed.free_text < 0)).sum())
        advantages = np.repeat(advantages_R, lengths_R).astype(np.float32)
        diagnostics = Diagnostics()
        self.engine.engine.train()

        def losses() -> Iterator[Tensor]:
            for part in parts:
                if part is None:  # every rank takes part in every reduction
                    yield self.engine.policy(pack_rows([PLACEHOLDER]).to(device)).sum() * 0.0
                    continue
                log_mass_C: Tensor | None = None
                if self.valid_mass:
                    current_T, log_mass_C = self.engine.policy(
                        part.packed, part.allowed, self.free_text_masks, self.temperature, valid_mass=True
                    )
                else:
                    current_T = self._log_probabilities(self.engine.policy, part)
                old_T = current_T.detach() if part.old_T is None else part.old_T
                sampler_T = torch.from_numpy(batch.log_probabilities.values[part.at_T]).to(device)
                assert part.reference_T is not None
                loss_T, values_T = token_losses(
                    current_T, old_T, sampler_T, part.reference_T, torch.from_numpy(advantages[part.at_T]).to(device),
                    self.objective,
                )  # fmt: skip
                loss = (weights[part.at_T].to(device) * loss_T).sum()
                if log_mass_C is not None:
                    if self.objective.valid_mass_coefficient:
                        loss = loss - self.objective.valid_mass_coefficient * log_mass_C.sum() / constrained
                    diagnostics.add_valid_mass(log_mass_C.detach())
                diagnostics.add(float(loss.detach()), current_T.detach(), old_T, sampler_T, values_T, part.allowed)
                yield loss * self.engine.ranks  # DeepSpeed averages over the ranks

        true_parts, true_losses = self._true_answers(batch, groups, diagnostics)
        norm = self.engine.step(chain(losses(), true_losses), len(parts) + true_parts)
        return {
            **diagnostics.over_ranks(
                self.engine, valid_mass=self.valid_mass, true_answers=self.objective.true_answer_coefficient > 0
            ),
            "gradient_norm": norm,
            "learning_rate": self.engine.learning_rate,
            "skipped": float(self.engine.skipped),
        }

    def _true_answers(
        self, batch: RolloutBatch, groups: np.ndarray, diagnostics: Diagnostics
    ) -> tuple[int, Iterator[Tensor]]:
        """The number of this rank's micro-batches of a mini-batch's true answers, and their losses: minus the mean
        log-probability of the answers' tokens, times reasoning's share of the prompts."""
        reasoning_G = batch.prompts.reasoning[groups]
        if not self.objective.true_answer_coefficient or not reasoning_G.any():
            return 0, iter(())
        answers, share = true_answers(batch.select(groups[reasoning_G]), self.constraint), float(reasoning_G.mean())
        allowed = allowed_in(answers, self.constraint).allowed
        counted_T = allowed.has_choice & in_answer(answers, self.constraint)
        weight = self.objective.true_answer_coefficient * share / int(counted_T.sum())
        parts = self._own_parts(answers, np.arange(len(answers)), allowed)

        def losses() -> Iterator[Tensor]:
            for part in parts:
                if part is None:
                    yield self.engine.policy(pack_rows([PLACEHOLDER]).to(self.engine.device)).sum() * 0.0
                    continue
                counted = torch.from_numpy(counted_T[part.at_T]).to(self.engine.device)
                log_probabilities_T = self._log_probabilities(self.engine.policy, part)[counted]
                loss = -weight * log_probabilities_T.sum()
                diagnostics.add_true_answers(float(loss.detach()), log_probabilities_T.detach())
                yield loss * self.engine.ranks

        return len(parts), losses()

    def _token_weights(
        self, batch: RolloutBatch, groups: np.ndarray, in_mini_T: np.ndarray, allowed: AllowedTokens
    ) -> Tensor:
        """float32 [tokens of the batch]: the weight of each in the loss of a mini-batch of some groups, else 0."""
        response_T = np.repeat(np.arange(len(batch.responses)), batch.responses.lengths)[in_mini_T]
        mode_T = batch.prompts.reasoning[batch.group_of_response[response_T]].astype(np.int64)
        reasoning_share = float(batch.prompts.reasoning[groups].mean())
        per_part = self.objective.token_mean == "per_part"
        weights_T = torch.zeros(len(in_mini_T))
        weights_T[torch.from_numpy(in_mini_T)] = token_weights(
            torch.from_numpy(mode_T), torch.from_numpy(allowed.has_choice[in_mini_T]),
            (1 - reasoning_share, reasoning_share), self.objective.token_mean,
            response_T=torch.from_numpy(response_T), longest=int(batch.prompts.budgets[groups].max()),
            answer_T=torch.from_numpy(in_answer(batch, self.constraint)[in_mini_T]) if per_part else None,
        )  # fmt: skip
        return weights_T
