"""Layouts of training batches: who sees whom, what is predicted where, and how rows are cut into micro-batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import policy_of

from learner.packing import balanced_micro_batches, pack_groups, pack_rows, packed_length
from learner.rollouts import allowed_in
from learner.srpo import response_log_probabilities

GROUPS = [
    (np.array([5, 6, 7]), [np.array([8, 9, 1]), np.array([1]), np.array([10, 1])]),
    (np.array([11]), [np.array([12, 13, 14, 1])]),
]


def test_a_group_is_laid_out_once_with_positions_that_restart_after_the_prompt():
    packed = pack_groups(GROUPS)
    assert [packed_length(*group) for group in GROUPS] == [6, 4]
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert packed.targets_T.tolist() == [8, 9, 1, 1, 10, 1, 12, 13, 14, 1]
    # The first token of every response is predicted from the prompt's last token.
    assert packed.position_T.tolist() == [2, 3, 4, 2, 2, 5, 6, 7, 8, 9]
    assert [(part.span, part.prompt, part.responses.rows, part.responses.longest) for part in packed.parts] == [
        ((0, 6), 3, 2, 2), ((6, 10), 1, 1, 3),
    ]  # fmt: skip
    assert pack_groups([(np.array([3]), [np.array([1]), np.array([1])])]).parts[0].responses is None


def test_packed_groups_predict_as_every_response_does_alone_without_padding(tiny):
    prompts = tiny.prompts(["direct", "reasoning", "reasoning"])
    batch = tiny.random_rollouts(prompts, responses=3, seed=1)
    groups = [(prompts.tokens[g], [batch.responses[3 * g + i] for i in range(3)]) for g in range(3)]
    with torch.inference_mode():
        together = policy_of(tiny.model)(pack_groups(groups))
        alone = []
        for prompt, responses in groups:
            for response in responses:
                logits = tiny.model(torch.from_numpy(np.concatenate([prompt, response]))[None].long()).logits[0]
                rows = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
                alone.append(rows[torch.arange(len(response)), torch.from_numpy(response).long()])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_supervised_rows_lie_one_after_the_other_and_only_learnt_tokens_are_targets():
    rows = [
        (np.array([8, 9]), np.array([False, True])),
        (np.array([4, 5, 6, 7]), np.array([True, False, True, True])),  # the first token is never a target
        (np.array([3, 2, 1]), np.array([False, False, False])),
    ]
    packed = pack_rows(rows)
    assert packed.input_ids.tolist() == [[4, 5, 6, 7, 3, 2, 1, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert packed.position_T.tolist() == [1, 2, 7]
    assert packed.targets_T.tolist() == [6, 7, 9]
    assert [(bucket.span, bucket.rows, bucket.longest) for bucket in packed.parts] == [((0, 7), 2, 4), ((7, 9), 1, 2)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 200))
def test_ranks_share_all_rows_within_the_budget(lengths, ranks, budget):
    plan = balanced_micro_batches(lengths, ranks=ranks, token_budget=budget)
    assert len(plan) == ranks
    assert len({len(parts) for parts in plan}) == 1, "every rank takes part in every reduction"
    assert sorted(int(row) for parts in plan for part in parts for row in part) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in part) for parts in plan for part in parts]
    for parts in plan:
        for part in parts:
            assert len(part) <= 1 or sum(lengths[row] for row in part) <= budget
    # The heaviest micro-batch is heavier than the lightest by one row at most.
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_the_budget_of_a_micro_batch_does_not_change_log_probabilities(tiny, budget):
    batch = tiny.random_rollouts(tiny.prompts(["direct", "reasoning"] * 2), responses=2, seed=2)
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    allowed = allowed_in(batch, tiny.constraint).allowed
    values, whole = (
        response_log_probabilities(
            policy_of(tiny.model), batch, allowed, masks, temperature=1.0, micro_batch_tokens=tokens
        )
        for tokens in (budget, 10**6)
    )
    torch.testing.assert_close(values, whole, rtol=0, atol=1e-5)
