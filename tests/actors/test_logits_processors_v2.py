"""The adapter for model runner V2 against the interface that ships with vLLM: real dataclasses, tensors on the CPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from actors.logits_processors_v2 import ItemConstraintProcessorV2
from item_index.constraint import Mode

SLOTS, LENGTH = 8, 160


def parameters(tiny, mode: Mode, budget: int, excluded=()):
    return SamplingParams(
        max_tokens=budget,
        extra_args={"gream": {"mode": mode, "index_version": tiny.index.version, "excluded": list(excluded)}},
    )


def staged(values):
    """What the processor reads of the runner's buffers: a tensor on the device and its twin on the host."""
    return SimpleNamespace(gpu=torch.from_numpy(values), np=values)


@pytest.fixture
def runner(tiny):
    """The runner's request states and a processor over them."""
    states = LogitsProcRequestState(
        device=torch.device("cpu"), max_num_reqs=SLOTS, vocab_size=len(tiny.tokenizer),
        all_token_ids=staged(np.zeros((SLOTS, LENGTH), dtype=np.int32)), prompt_len=staged(np.zeros(SLOTS, np.int32)),
        prefill_len=staged(np.zeros(SLOTS, np.int32)), total_len=staged(np.zeros(SLOTS, np.int32)),
    )  # fmt: skip
    config = SimpleNamespace(
        additional_config={"gream": {"index": str(tiny.index_folder), "tokenizer": str(tiny.checkpoint)}},
        model_config=SimpleNamespace(get_vocab_size=lambda: len(tiny.tokenizer), seed=0), speculative_config=None,
    )  # fmt: skip
    return SimpleNamespace(states=states, config=config, processor=ItemConstraintProcessorV2(config, states))


def context(slots, lengths):
    mapping = torch.tensor(slots, dtype=torch.int32)
    return LogitsContext(
        expanded_idx_mapping=mapping, idx_mapping=mapping, idx_mapping_np=mapping.numpy(),
        expanded_local_pos=torch.zeros_like(mapping), input_ids=torch.zeros_like(mapping),
        pos=torch.tensor(lengths) - 1, seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
    )  # fmt: skip


def admit(runner, slot, prompt, params, output=()):
    """A request enters a slot, or comes back to one with what it had written."""
    tokens = [*prompt, *output]
    runner.states.all_token_ids.np[slot, : len(tokens)] = tokens
    runner.states.prompt_len.np[slot] = len(prompt)
    runner.states.prefill_len.np[slot] = len(tokens)
    return runner.processor.add_request(slot, params)


def masked(runner, tiny, slots, lengths):
    logits = torch.zeros(len(slots), len(tiny.tokenizer))
    return torch.isfinite(runner.processor.apply(logits, context(slots, lengths))).numpy()


def expected_mask(tiny, prompts, group, response):
    """bool [V]: what the constraint allows after a beginning of a response."""
    mode = "reasoning" if prompts.reasoning[group] else "direct"
    states = tiny.constraint.start([mode], [int(prompts.budgets[group])], [prompts.excluded[group]])
    for token in response:
        tiny.constraint.advance(states, np.array([token]))
    allowed = tiny.constraint.allowed(states)
    mask = np.zeros(len(tiny.tokenizer), dtype=bool)
    if allowed.free_text[0] >= 0:
        mask |= tiny.constraint.free_text_masks[allowed.free_text[0]]
    mask[allowed.listed[0]] = True
    return mask


def test_masks_along_random_responses_in_shuffled_rows_with_a_restart(runner, tiny):
    modes = ["direct", "reasoning", "reasoning", "direct"]
    prompts = tiny.prompts(modes, excluded=[[0, 3], [], [5], []])
    batch = tiny.random_rollouts(prompts, responses=1, seed=3)
    slots = [6, 1, 4, 3]
    for group, slot in enumerate(slots):
        mode = modes[group]
        params = parameters(tiny, mode, int(prompts.budgets[group]), prompts.excluded[group].tolist())
        assert admit(runner, slot, prompts.tokens[group].tolist(), params)
    generator = np.random.default_rng(0)
    for place in range(int(batch.responses.lengths.max())):
        groups = generator.permutation([group for group in range(4) if place < batch.responses.lengths[group]])
        lengths = [len(prompts.tokens[group]) + place for group in groups]
        if place == 3:  # one is preempted: it comes back in another slot with what it has written
            group = int(groups[0])
            params = parameters(tiny, modes[group], int(prompts.budgets[group]), prompts.excluded[group].tolist())
            slots[group] = 7
            admit(runner, 7, prompts.tokens[group].tolist(), params, output=batch.responses[group][:place].tolist())
        masks = masked(runner, tiny, [slots[group] for group in groups], lengths)
        for row, group in enumerate(groups):
            assert np.array_equal(masks[row], expected_mask(tiny, prompts, group, batch.responses[group][:place]))
            at = len(prompts.tokens[group]) + place
            runner.states.all_token_ids.np[slots[group], at] = batch.responses[group][place]


def test_a_reused_slot_forgets_its_last_request_and_other_requests_are_left_alone(runner, tiny):
    prompts = tiny.prompts(["direct", "reasoning"])
    first = prompts.tokens[0].tolist()
    admit(runner, 2, first, parameters(tiny, "direct", 6))
    assert masked(runner, tiny, [2], [len(first)]).sum() < 10
    assert not admit(runner, 2, first, SamplingParams(max_tokens=4))
    assert masked(runner, tiny, [2], [len(first)]).all()
    second = prompts.tokens[1].tolist()
    admit(runner, 2, second, parameters(tiny, "reasoning", 48))
    assert np.array_equal(masked(runner, tiny, [2], [len(second)])[0], expected_mask(tiny, prompts, 1, []))
    # A prompt that is being read in parts has nothing to consume.
    assert np.array_equal(masked(runner, tiny, [2], [3])[0], expected_mask(tiny, prompts, 1, []))


def test_impossible_requests_and_drafted_tokens_are_refused(runner, tiny):
    other = SamplingParams(max_tokens=6, extra_args={"gream": {"mode": "direct", "index_version": "x"}})
    with pytest.raises(ValueError, match="index version x"):
        runner.processor.add_request(0, other)
    bad = parameters(tiny, "direct", 6)
    bad.top_p = 0.5
    with pytest.raises(ValueError, match="top_p"):
        ItemConstraintProcessorV2.validate_params(bad)
    runner.config.speculative_config = object()
    with pytest.raises(ValueError, match="speculative"):
        ItemConstraintProcessorV2(runner.config, runner.states)
