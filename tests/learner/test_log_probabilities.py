"""Log-probabilities over allowed sets against a slow reading: a response at a time, full logits, a token at a time."""

import numpy as np
import pytest
import torch
from devices import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from tiny import allowed_tokens, policy_of

from item_index.constraint import AllowedTokens
from item_index.ragged import RaggedArray
from learner import log_probabilities
from learner.log_probabilities import (
    allowed_log_probabilities,
    full_vocabulary_log_probabilities,
    log_valid_masses,
)
from learner.packing import pack_groups
from learner.rollouts import allowed_in

MODES = ["direct", "reasoning", "reasoning", "direct"]
EXCLUDED = [[], [], [0, 5, 11], [9, 30]]


def slow_log_probabilities(tiny, batch, temperature):
    """float32 [tokens], with gradients to the model; and bool [tokens], whether there was a choice."""
    values, choice = [], []
    for row, response in enumerate(batch.responses):
        group = batch.group_of_response[row]
        prompt = batch.prompts.tokens[group]
        states = tiny.constraint.start(
            ["reasoning" if batch.prompts.reasoning[group] else "direct"],
            [int(batch.prompts.budgets[group])],
            [batch.prompts.excluded[group]],
        )
        logits = tiny.model(torch.from_numpy(np.concatenate([prompt, response]))[None].long()).logits[0] / temperature
        for place, token in enumerate(response):
            allowed = sorted(allowed_tokens(tiny.constraint, states))
            mask = torch.full((logits.shape[1],), float("-inf"))
            mask[allowed] = 0.0
            values.append((logits[len(prompt) - 1 + place] + mask).log_softmax(dim=-1)[int(token)])
            choice.append(len(allowed) > 1)
            tiny.constraint.advance(states, np.array([token]))
    return torch.stack(values), np.array(choice)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_log_probabilities_and_gradients_equal_the_slow_ones(tiny, temperature):
    batch = tiny.random_rollouts(tiny.prompts(MODES, excluded=EXCLUDED), responses=3, seed=3)
    allowed = allowed_in(batch, tiny.constraint).allowed
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    groups = [(batch.prompts.tokens[g], batch.responses_of(g)) for g in range(len(MODES))]
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=len(batch.responses.values))).float()

    def gradients(model, values):
        model.zero_grad()
        (weights * values).mean().backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        model.zero_grad()
        return found

    slow, choice = slow_log_probabilities(tiny, batch, temperature)
    policy = policy_of(tiny.model)
    fast = policy(pack_groups(groups), allowed, masks, temperature)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    assert allowed.has_choice.tolist() == choice.tolist()
    assert choice.any()
    assert not choice.all()
    assert (fast[torch.from_numpy(~choice)] == 0).all()
    expected = gradients(tiny.model, slow)
    for name, gradient in gradients(policy.language_model, fast).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def random_head(tokens=4, hidden=8, vocabulary=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, hidden, generator=generator), torch.randn(vocabulary, hidden, generator=generator)


@st.composite
def listed_sets(draw):
    """A vocabulary's size, allowed sets of some positions (at least one token each), and a target out of each."""
    size = draw(st.integers(2, 40))
    sets = draw(st.lists(st.sets(st.integers(0, size - 1), min_size=1), min_size=1, max_size=12))
    return size, [sorted(allowed) for allowed in sets], [draw(st.sampled_from(sorted(allowed))) for allowed in sets]


@pytest.mark.parametrize("device", DEVICES)
@given(listed_sets(), st.sampled_from([torch.float64, torch.float32]), st.floats(0.3, 3.0), st.integers(0, 999))
def test_constrained_values_and_valid_mass_are_those_of_the_masked_vocabulary(device, case, dtype, temperature, seed):
    vocabulary, sets, targets = case
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sets), 8, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
    targets_T, mask = torch.tensor(targets), torch.zeros(len(sets), vocabulary, dtype=torch.bool)
    for row, tokens in enumerate(sets):
        mask[row, tokens] = True
    whole = (hidden @ head.T / temperature).log_softmax(dim=1)
    masked = whole.masked_fill(~mask, float("-inf")).log_softmax(dim=1)[torch.arange(len(sets)), targets_T]
    mass = whole.masked_fill(~mask, float("-inf")).logsumexp(dim=1)

    allowed = AllowedTokens(np.full(len(sets), -1, dtype=np.int8), RaggedArray.of(sets, np.int64))
    hidden, head, targets_T = hidden.to(device, dtype), head.to(device, dtype), targets_T.to(device)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    none = torch.zeros(0, vocabulary, dtype=torch.bool)
    values = allowed_log_probabilities(hidden, head, targets_T, allowed, none, temperature=temperature)
    torch.testing.assert_close(values.cpu().double(), masked, rtol=bound, atol=bound)
    found = log_valid_masses(hidden, head, targets_T, values, temperature=temperature)
    torch.testing.assert_close(found.cpu().double(), mass, rtol=bound, atol=bound)


def test_listed_tokens_come_on_top_of_the_free_text_set():
    hidden, head = random_head(tokens=3)
    masks = torch.zeros(2, 12, dtype=torch.bool)
    masks[0, [1, 2]] = True
    masks[1, [3, 4]] = True
    allowed = AllowedTokens(np.array([0, 1, -1], dtype=np.int8), RaggedArray.of([[7], [], [5, 6]], np.int64))
    values = allowed_log_probabilities(hidden, head, torch.tensor([7, 4, 6]), allowed, masks)
    for row, (target, members) in enumerate([(7, [1, 2, 7]), (4, [3, 4]), (6, [5, 6])]):
        logits = head[members] @ hidden[row]
        torch.testing.assert_close(values[row], logits.log_softmax(dim=0)[members.index(target)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("free_text", [-1, 0])
@pytest.mark.parametrize("device", DEVICES)
def test_a_target_outside_its_allowed_set_is_an_error(free_text, device):
    hidden, head = (states.to(device) for states in random_head(tokens=2))
    masks = torch.zeros(2, 12, dtype=torch.bool, device=device)
    masks[0, [1, 2]] = True
    listed = [[5, 6], [5, 6]] if free_text < 0 else [[], []]
    allowed = AllowedTokens(np.full(2, free_text, dtype=np.int8), RaggedArray.of(listed, np.int64))
    inside = 5 if free_text < 0 else 1
    with pytest.raises(ValueError, match="position 1: token 9 is outside its allowed set"):
        allowed_log_probabilities(hidden, head, torch.tensor([inside, 9], device=device), allowed, masks)


def test_a_wrong_number_of_allowed_sets_is_an_error():
    hidden, head = random_head(tokens=2)
    allowed = AllowedTokens(np.full(1, -1, dtype=np.int8), RaggedArray.of([[1]], np.int64))
    with pytest.raises(ValueError, match="2 targets but 1 allowed sets"):
        allowed_log_probabilities(hidden, head, torch.tensor([1, 1]), allowed, torch.zeros(2, 12, dtype=torch.bool))


@pytest.mark.parametrize("positions_of_a_chunk", [1, 3, 100])
@pytest.mark.parametrize("kept_bytes", [0, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_over_the_vocabulary_are_those_of_all_logits_in_any_chunk(
    monkeypatch, positions_of_a_chunk, kept_bytes, temperature, device
):
    monkeypatch.setattr(log_probabilities, "CHUNK_BYTES", positions_of_a_chunk * 12 * 8)
    monkeypatch.setattr(log_probabilities, "KEPT_BYTES", kept_bytes)
    hidden, head = (states.double().requires_grad_() for states in random_head(tokens=7))
    targets = torch.tensor([7, 2, 3, 4, 9, 3, 1])
    masks = torch.ones(2, 12, dtype=torch.bool)
    masks[0, [5, 7, 9]] = False
    masks[1, [0, 1, 2]] = False
    listed = [[7, 9], [], [], [], [9], [], [1]]
    kinds = np.array([0, 0, 1, 1, 0, 0, 1], dtype=np.int8)
    allowed = AllowedTokens(kinds, RaggedArray.of(listed, np.int64))
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)

    logits = hidden @ head.T / temperature
    mask = masks[torch.from_numpy(kinds).long()].clone()
    for row, tokens in enumerate(listed):
        mask[row, tokens] = True
    slow = logits.masked_fill(~mask, float("-inf")).log_softmax(dim=-1)[torch.arange(7), targets]
    fast = allowed_log_probabilities(
        hidden.to(device), head.to(device), targets.to(device), allowed, masks.to(device), temperature=temperature
    ).cpu()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    expected = torch.autograd.grad((weights * slow).sum(), (hidden, head))
    for one, other in zip(torch.autograd.grad((weights * fast).sum(), (hidden, head)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_whole_vocabulary_is_the_softmax_of_all_logits():
    hidden, head = random_head(tokens=7)
    targets = torch.arange(7)
    expected = (hidden @ head.T).log_softmax(dim=-1)[torch.arange(7), targets]
    torch.testing.assert_close(full_vocabulary_log_probabilities(hidden, head, targets), expected, rtol=0, atol=1e-6)
    half = full_vocabulary_log_probabilities(hidden.bfloat16(), head.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.1)
