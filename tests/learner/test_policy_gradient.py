"""The policy gradient where every outcome can be enumerated, and rollouts that no update may be made of."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import policy_of

from item_index.constraint import ConstraintViolation
from item_index.ragged import RaggedArray
from learner.advantages import groups_with_variance
from learner.objective import ObjectiveSettings, token_losses, token_weights
from learner.packing import pack_groups
from learner.rollouts import RolloutBatch, allowed_in, in_answer, true_answers
from learner.srpo import micro_batch


def batch_of(tiny, prompts, responses):
    """Groups of given responses."""
    flat = [tokens for group in responses for tokens in group]
    return RolloutBatch(
        prompts=prompts,
        group_sizes=np.array([len(group) for group in responses]),
        responses=RaggedArray.of(flat, np.int32),
        log_probabilities=RaggedArray.of([np.zeros(len(tokens)) for tokens in flat], np.float32),
        weight_versions=np.zeros(len(prompts), dtype=np.int64),
        index_version=tiny.index.version,
    )


def test_the_answer_is_what_stands_behind_its_opening(tiny):
    think = "Evidence: one. Preference: two. Intent: three. Recommendation: four."
    chain = tiny.builder.reasoning_response(think, "Rewritten history: ", 4)
    direct = tiny.builder.direct_response(5)
    batch = batch_of(tiny, tiny.prompts(["reasoning", "direct", "reasoning"]), [[chain], [direct], [chain]])
    opening = chain.index(tiny.constraint.tokens.answer_open)
    of_chain = [False] * (opening + 1) + [True] * (len(chain) - opening - 1)
    assert in_answer(batch, tiny.constraint).tolist() == [*of_chain, *[False] * len(direct), *of_chain]


def test_true_answers_stand_behind_the_chain_of_the_first_response(tiny):
    think = "Evidence: one. Preference: two. Intent: three. Recommendation: four."
    chains = [tiny.builder.reasoning_response(think, rewriting, 4) for rewriting in ("Rewritten history: ", "Other: ")]
    prompts = tiny.prompts(["direct", "reasoning", "direct", "reasoning"])
    answers = [[tiny.builder.direct_response(7)] * 2, chains, [tiny.builder.direct_response(8)], chains[::-1]]
    found = true_answers(batch_of(tiny, prompts, answers), tiny.constraint)
    assert found.group_sizes.tolist() == [1, 1]
    assert [response.tolist() for response in found.responses] == [
        tiny.builder.reasoning_response(think, rewriting, int(target))
        for rewriting, target in (("Rewritten history: ", prompts.targets[1]), ("Other: ", prompts.targets[3]))
    ]


def test_true_answers_stay_within_the_constraint_whatever_was_sampled(tiny):
    batch = tiny.random_rollouts(tiny.prompts(["reasoning", "direct"] * 12, budget=20), responses=2, seed=3)
    found = allowed_in(true_answers(batch, tiny.constraint), tiny.constraint)
    assert found.forced_R.any(), "no chain was cut off by its budget"
    assert found.allowed.has_choice.any()


def test_weighted_by_probability_the_policy_gradients_of_all_outcomes_are_the_exact_gradient(tiny):
    excluded = [3, 8]
    items = [item for item in range(len(tiny.index)) if item not in excluded]
    prompts = tiny.prompts(["direct"], excluded=[excluded])
    batch = batch_of(tiny, prompts, [[tiny.builder.direct_response(item) for item in items]])
    lengths = torch.from_numpy(batch.responses.lengths)
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=len(items)))
    allowed = allowed_in(batch, tiny.constraint).allowed
    policy = policy_of(copy.deepcopy(tiny.model).double())
    part = micro_batch(batch, np.array([0]), allowed)
    masks = torch.from_numpy(tiny.constraint.free_text_masks)

    current = policy(part.packed, part.allowed, masks)
    probability = torch.stack([tokens.sum().exp() for tokens in current.split(lengths.tolist())])
    assert float(probability.detach().sum()) == pytest.approx(1, abs=1e-6)
    weights = list(policy.parameters())
    exact = torch.autograd.grad((probability * rewards).sum(), weights, retain_graph=True)

    old = current.detach()
    advantages = torch.repeat_interleave(rewards, lengths)
    settings = ObjectiveSettings(kl_coefficient=0.0, token_mean="constant")
    losses, _ = token_losses(current, old, old, old, advantages, settings)
    longest = int(lengths.max())
    token_weight = token_weights(
        torch.zeros(len(old), dtype=torch.int64), torch.from_numpy(allowed.has_choice), (1, 0), "constant",
        response_T=torch.repeat_interleave(lengths), longest=longest,
    ) * (len(items) * longest)  # fmt: skip
    expected_loss = (torch.repeat_interleave(probability.detach(), lengths) * token_weight * losses).sum()
    for found, wanted in zip(torch.autograd.grad(expected_loss, weights), exact, strict=True):
        torch.testing.assert_close(-found, wanted, rtol=1e-6, atol=1e-9)
    assert max(float(gradient.abs().max()) for gradient in exact) > 1e-3


def test_an_empty_response_is_named(tiny):
    prompts = tiny.prompts(["direct", "direct"])
    answer = tiny.builder.direct_response(4)
    batch = batch_of(tiny, prompts, [[answer, answer], [answer, []]])
    groups = [(batch.prompts.tokens[group], batch.responses_of(group)) for group in range(2)]
    with pytest.raises(ValueError, match="group 1: response 1 is empty"):
        pack_groups(groups)


def test_a_response_beyond_its_budget_is_refused(tiny):
    batch = tiny.random_rollouts(tiny.prompts(["direct", "reasoning"], budget=60), responses=[9, 1], seed=1)
    allowed_in(batch, tiny.constraint)
    budgets = batch.prompts.budgets - np.array([0, 60 - len(batch.responses[9]) + 1], dtype=np.int32)
    shorter = replace(batch, prompts=replace(batch.prompts, budgets=budgets))
    with pytest.raises(ConstraintViolation, match="response 9: token"):
        allowed_in(shorter, tiny.constraint)


def test_a_group_of_one_is_never_chosen(tiny):
    rewards = torch.tensor([1.0, 0.0, 0.5])
    assert groups_with_variance(rewards, torch.tensor([1, 2])).tolist() == [False, True]


@pytest.mark.parametrize("sizes", [[2, 1], [4, 0], [4], [1, 1, 2]])
def test_groups_that_cannot_be_are_refused(tiny, sizes):
    answer = tiny.builder.direct_response(4)
    batch = batch_of(tiny, tiny.prompts(["direct", "direct"]), [[answer, answer], [answer, answer]])
    with pytest.raises(ValueError, match="groups"):
        replace(batch, group_sizes=np.array(sizes))
