"""Groups packed with their prompt once: the log-probabilities and gradients of one padless response at a time."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import policy_of
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from learner import packed_attention
from learner.packed_attention import RowBucket
from learner.packing import pack_groups
from learner.shared_prefix import masked_shared_prefix_attention, shared_prefix_attention

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
}
DIRECT = [3, 3, 3, 3]
REASONING = [9, 1, 14, 2, 14]


def groups_of(*sizes, seed=0):
    """Groups (prompt, responses) of (prompt length, response lengths)."""
    generator = np.random.default_rng(seed)
    return [
        (generator.integers(1, VOCABULARY, prompt), [generator.integers(1, VOCABULARY, size) for size in responses])
        for prompt, responses in sizes
    ]


def model_of(name, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa").to(dtype)
    for module in model.modules():  # transformers' norms compute in float32 whatever the weights are
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = type("Norm", (ExactNorm, type(module)), {})
    return model


class ExactNorm:
    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


def one_response_at_a_time(model, groups):
    """transformers' own attention, one unpadded sequence per forward pass, log-softmax over all logits."""
    values = []
    for prompt, responses in groups:
        for response in responses:
            logits = model(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0, len(prompt) - 1 : -1]
            values.append(logits.log_softmax(dim=-1)[torch.arange(len(response)), torch.from_numpy(response)])
    return torch.cat(values)


def assert_same(model, groups, *, tolerance, checkpointing, device="cpu"):
    policy = policy_of(model).to(device)
    expected = one_response_at_a_time(model, groups)
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=len(expected))).to(expected.dtype)
    (weights * expected).sum().backward()
    if checkpointing:
        policy.train()
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    values = policy(pack_groups(groups).to(device)).cpu()
    (weights * values).sum().backward()
    assert (values - expected).abs().max() <= tolerance * expected.abs().max()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    floor = 1e-4 * max(gradient.abs().max() for gradient in wanted.values())  # below it a gradient is rounding alone
    for (name, gradient), weight in zip(wanted.items(), policy.parameters(), strict=True):
        assert (weight.grad.cpu() - gradient).abs().max() <= tolerance * max(gradient.abs().max(), floor), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("masked_tokens", [0, 300])
def test_packed_groups_are_one_response_at_a_time(
    monkeypatch, name, checkpointing, dtype, tolerance, masked_tokens, device
):
    monkeypatch.setattr(packed_attention, "MASKED_TOKENS", masked_tokens)
    groups = groups_of((11, DIRECT), (6, REASONING), (1, [1, 1]), (8, [5]))
    if device != "cpu":  # transformers' rotary angles are float32 in every model, and their sines differ there
        tolerance = max(tolerance, 1e-6)
    assert_same(model_of(name, dtype), groups, tolerance=tolerance, checkpointing=checkpointing, device=device)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=16)), min_size=1, max_size=3
    ),
    st.sampled_from([0, 60, 300]),
)
def test_groups_of_any_sizes_are_one_response_at_a_time(sizes, masked_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "MASKED_TOKENS", masked_tokens)
        assert_same(model_of("qwen3", torch.float64), groups_of(*sizes), tolerance=1e-10, checkpointing=False)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [7, 1, 3, 7]])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_merged_parts_are_one_softmax_also_where_scores_are_large(lengths, key_heads):
    responses = RowBucket.of(np.array(lengths), 0)
    generator = torch.Generator().manual_seed(0)

    def states(heads, tokens):
        return (20 * torch.randn(heads, tokens, 8, generator=generator, dtype=torch.float64)).requires_grad_()

    tokens = sum(lengths)
    inputs = [states(4, tokens), states(key_heads, tokens), states(key_heads, tokens)]
    inputs += [states(key_heads, 9), states(key_heads, 9)]
    weights = torch.randn(tokens, 4, 8, generator=generator, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad((weights * attention(*inputs, responses, 0.4)).sum(), inputs)
        for attention in (shared_prefix_attention, masked_shared_prefix_attention)
    )
    for one, other in zip(got, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("masked_tokens", [0, 300])
def test_nothing_of_a_group_reaches_another_and_nothing_of_a_response_its_siblings(monkeypatch, masked_tokens):
    """Another token in one response changes the gradient at the inputs of the prompt and of that response alone."""
    monkeypatch.setattr(packed_attention, "MASKED_TOKENS", masked_tokens)
    policy = policy_of(model_of("llama", torch.float64))
    groups = groups_of((5, [4, 4, 6]), (5, [3, 3]))
    changed = copy.deepcopy(groups)
    changed[0][1][1][2] = changed[0][1][1][2] % (VOCABULARY - 1) + 1

    def gradients(groups):
        batch = pack_groups(groups)
        embedded = policy.language_model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        hidden = policy.language_model.base_model(
            inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False, packed_parts=batch.parts
        ).last_hidden_state[0]
        hidden.square().sum().backward()
        return hidden.detach(), embedded.grad[0]

    (hidden, gradient), (other_hidden, other_gradient) = gradients(groups), gradients(changed)
    ends = np.cumsum([0, 5, 3, 3, 5, 5, 2, 2])  # prompt, three responses, prompt, two responses

    def differs(one, other):
        return [bool((one[start:stop] != other[start:stop]).any()) for start, stop in pairwise(ends)]

    assert differs(hidden, other_hidden) == [False, False, True, False, False, False, False]
    assert differs(gradient, other_gradient) == [True, False, True, False, False, False, False]


def test_attention_dropout_is_refused():
    model = model_of("llama", torch.float32)
    policy = policy_of(model)
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        policy.train()(pack_groups(groups_of((3, [2]))))


def test_the_gradient_is_the_same_to_the_bit_every_time():
    # The first tokens of all responses are predicted at one place, where their gradients add up.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        policy = policy_of(model_of("llama", torch.float32))
        batch = pack_groups(groups_of((5, [1] * 3000)))
        gradients = []
        for _ in range(10):
            policy.zero_grad()
            policy(batch).sum().backward()
            gradients.append([weight.grad.clone() for weight in policy.parameters()])
    finally:
        torch.set_num_threads(threads)
    for gradient in gradients[1:]:
        assert all(map(torch.equal, gradient, gradients[0]))
