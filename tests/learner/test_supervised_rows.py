"""Packed supervised rows: the loss and gradients of one row at a time, and nothing of one row in another."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from learner.packed_attention import PACKED, row_buckets
from learner.packing import pack_rows
from learner.policy import Policy

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with all heads": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
}


def policy_of(config, attention):
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention))


def rows_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [(generator.integers(1, VOCABULARY, length), generator.random(length) < 0.6) for length in lengths]


def loss_one_row_at_a_time(policy, rows):
    """transformers' own attention, one unpadded row per forward pass, log-softmax over all logits."""
    losses = []
    for tokens, learnt in rows:
        logits = policy.language_model(input_ids=torch.from_numpy(tokens)[None]).logits[0, :-1]
        picked = logits.log_softmax(dim=-1)[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])]
        losses.append(-picked[torch.from_numpy(learnt[1:])].sum())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_training_is_one_row_at_a_time_training(name, checkpointing):
    rows = rows_of([9, 30, 1, 9, 2, 25, 28, 3, 1])
    reference, policy = policy_of(CONFIGS[name], "sdpa"), policy_of(CONFIGS[name], PACKED)
    expected = loss_one_row_at_a_time(reference, rows)
    expected.backward()
    if checkpointing:
        policy.train()
        policy.language_model.gradient_checkpointing_enable()
    loss = -policy(pack_rows(rows)).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (weight_name, wanted), got in zip(reference.named_parameters(), policy.parameters(), strict=True):
        scale = wanted.grad.abs().max()
        assert (got.grad - wanted.grad).abs().max() <= 1e-5 * scale, weight_name


def test_no_token_attends_to_another_row():
    """Other tokens in one row change the predictions and the gradient at the inputs of that row alone."""
    policy = policy_of(CONFIGS["qwen3"], PACKED)
    rows = rows_of([12, 12, 11, 5, 4])
    changed = [row if number != 2 else (rows_of([11], seed=9)[0][0], row[1]) for number, row in enumerate(rows)]

    def gradients(rows):
        batch = pack_rows(rows)
        embedded = policy.language_model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        hidden = policy.language_model.base_model(
            inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False, packed_parts=batch.parts
        ).last_hidden_state[0]
        hidden.square().sum().backward()
        return hidden.detach(), embedded.grad[0]

    ends = np.cumsum([0, 12, 12, 11, 5, 4])
    for before, after in zip(gradients(rows), gradients(changed), strict=True):
        differs = (before != after).any(dim=-1).numpy()
        of_row = [bool(differs[start:stop].any()) for start, stop in pairwise(ends)]
        assert of_row == [False, False, True, False, False]


def test_what_does_not_go_together_is_refused():
    rows = rows_of([4])
    with pytest.raises(ValueError, match="this one has sdpa"):
        policy_of(CONFIGS["llama"], "sdpa")(pack_rows(rows))
    window = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="one of 4"):
        policy_of(window, PACKED)(pack_rows(rows))
    with pytest.raises(ValueError, match="falling length"):
        row_buckets([3, 4])
