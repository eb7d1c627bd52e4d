"""The sampler that leaves the full vocabulary alone inside semantic IDs, in real vLLM, and the plain way beside it."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import policy_of
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.sampler import Sampler

from actors import constrained_sampler
from actors.reward import RewardWorker
from actors.rollout import prompt_seeds
from learner.rollouts import RolloutPrompts, allowed_in
from learner.srpo import response_log_probabilities

pytestmark = pytest.mark.engines
MODES = ["direct", "reasoning"] * 4
EXCLUDED = [[row, (row + 7) % 30, (row + 13) % 30] if row % 3 else [] for row in range(len(MODES))]


def put_plain_sampler(worker):
    """What an engine has that was started with the plain sampler."""
    runner, model = worker.model_runner, worker.model_runner.get_model()
    if isinstance(runner.sampler, constrained_sampler.ConstrainedSampler):
        runner.sampler = Sampler(logprobs_mode=runner.sampler.logprobs_mode)
        del model.compute_logits  # the instance's; the class has its own


@contextmanager
def sampling(engine, sampler):
    """The engine under one of the two samplers; the constrained one afterwards."""
    if sampler == "plain":
        engine.llm.collective_rpc(put_plain_sampler)
    try:
        yield engine
    finally:
        if sampler == "plain":
            assert engine.llm.collective_rpc("install_constrained_sampler") == [""]


def learner_values(tiny, batch, temperature):
    allowed = allowed_in(batch, tiny.constraint).allowed
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    values = response_log_probabilities(
        policy_of(tiny.model), batch, allowed, masks, temperature=temperature, micro_batch_tokens=4096
    )
    return values.numpy(), allowed


@pytest.mark.parametrize("sampler", ["constrained", "plain"])
@pytest.mark.parametrize(("responses", "temperature"), [(1, 0.7), (16, 1.0), (16, 0.7)])
def test_both_samplers_have_the_learners_log_probabilities(tiny, rollout_engine, sampler, responses, temperature):
    # Mixed modes, exclusion, prompts of one beginning (all share the system prompt; the last two share all tokens).
    prompts = tiny.prompts(MODES, excluded=EXCLUDED)
    prompts = RolloutPrompts.concatenate([prompts, prompts.select(np.array([7, 7]))])
    with sampling(rollout_engine, sampler) as engine:
        batch = engine.generate(
            prompts, responses=responses, seeds=prompt_seeds(11, 1, len(prompts)), temperature=temperature
        )
    learner, allowed = learner_values(tiny, batch, temperature)
    sampled = batch.log_probabilities.values
    assert np.abs(learner - sampled).max() < 2e-3
    chosen = allowed.has_choice
    assert abs(np.exp(learner[chosen] - sampled[chosen]).mean() - 1) < 1e-3
    assert np.abs(sampled[~chosen]).max() < 1e-6
    scores = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint)).score(batch)
    assert scores.valid.all()
    assert scores.forced[batch.prompts.reasoning[batch.group_of_response]].any(), "no closing was forced"


def test_rows_inside_semantic_ids_and_with_one_token_touch_no_full_head(tiny, rollout_engine):
    assert rollout_engine.sampler_in_use() == "constrained"

    def sampled(modes):
        before = rollout_engine.sampled_rows()
        prompts = tiny.prompts(modes)
        batch = rollout_engine.generate(prompts, responses=4, seeds=prompt_seeds(12, 1, len(modes)))
        after = rollout_engine.sampled_rows()
        return batch, {kind: after[kind] - before[kind] for kind in after}

    batch, rows = sampled(["direct"] * 6)
    assert rows["free text"] == rows["plain"] == 0
    assert rows["one token"] + rows["semantic ID"] == len(batch.responses.values)
    assert rows["one token"] >= len(batch.responses) // 2, "most items end where nothing else may follow"
    batch, rows = sampled(["reasoning"] * 6)
    free = int((allowed_in(batch, tiny.constraint).allowed.free_text >= 0).sum())
    assert rows["plain"] == 0
    assert rows["free text"] == free > 0
    assert rows["one token"] + rows["semantic ID"] == len(batch.responses.values) - free


def test_a_request_without_the_constraint_takes_the_batch_the_plain_way(tiny, rollout_engine):
    prompts = tiny.prompts(["direct"])
    tokens = prompts.tokens[0].tolist()
    gream = {"mode": "direct", "index_version": tiny.index.version, "excluded": []}
    before = rollout_engine.sampled_rows()["plain"]
    outputs = rollout_engine.llm.generate(
        [{"prompt_token_ids": tokens}] * 2,
        [
            SamplingParams(max_tokens=tiny.index.depth + 1, seed=1, logprobs=0, extra_args={"gream": gream}),
            SamplingParams(max_tokens=12, seed=2, ignore_eos=True, prompt_logprobs=0),
        ],
        use_tqdm=False,
    )
    assert rollout_engine.sampled_rows()["plain"] > before
    item = tuple(outputs[0].outputs[0].token_ids)
    assert item[:-1] in {tuple(tiny.builder.item_tokens[row]) for row in range(len(tiny.index))}
    assert len(outputs[1].outputs[0].token_ids) == 12
    # The prompt's own log-probabilities come from the head that the sampler has taken over.
    with torch.inference_mode():
        logits = tiny.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    given = [place[token].logprob for place, token in zip(outputs[1].prompt_logprobs[1:], tokens[1:], strict=True)]
    expected = logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    assert given == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    "option", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1.0}, {"logit_bias": {5: 1.0}}]
)
def test_an_option_that_changes_the_distribution_is_refused(tiny, rollout_engine, option):
    gream = {"mode": "direct", "index_version": tiny.index.version}
    prompt = {"prompt_token_ids": tiny.prompts(["direct"]).tokens[0].tolist()}
    with pytest.raises(VLLMValidationError, match=next(iter(option))):
        rollout_engine.llm.generate(
            [prompt], SamplingParams(max_tokens=6, extra_args={"gream": gream}, **option), use_tqdm=False
        )


def test_an_untested_vllm_gets_the_plain_sampler_and_says_so(rollout_engine, monkeypatch):
    from actors import worker_extension

    monkeypatch.setattr(worker_extension, "vllm_version", lambda: "0.99.0")
    rollout_engine.llm.collective_rpc(put_plain_sampler)
    try:
        assert "0.99.0 is not among the tested" in rollout_engine.llm.collective_rpc("install_constrained_sampler")[0]
        assert rollout_engine.llm.collective_rpc("sampled_rows") == [{}]
    finally:
        monkeypatch.undo()
        assert rollout_engine.llm.collective_rpc("install_constrained_sampler") == [""]


def test_prompts_that_cannot_be_answered_are_refused_and_the_engine_goes_on(tiny, rollout_engine):
    everything = [list(range(len(tiny.index)))]
    for prompts, message in (
        (tiny.prompts(["reasoning"], budget=6), "a budget of 6 tokens cannot hold an answer"),
        (tiny.prompts(["direct"], excluded=everything), "items are excluded; nothing can be answered"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout_engine.generate(prompts, responses=2, seeds=[1])
    assert len(rollout_engine.generate(tiny.prompts(["direct"]), responses=2, seeds=[1]).responses) == 2


def test_a_model_runner_other_than_the_processs_own_is_refused_at_start(tiny):
    from actors.rollout import RolloutEngine

    with pytest.raises(ValueError, match="model runner v2 needs VLLM_USE_V2_MODEL_RUNNER=1, but it is 0"):
        RolloutEngine(str(tiny.checkpoint), str(tiny.index_folder), model_runner="v2")
