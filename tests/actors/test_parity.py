"""The parity gate: sampler (real vLLM) and learner read the same policy, in both modes."""

import numpy as np
import pytest
import ray
import torch
from tiny import policy_of

from actors.learner import LearnerActor
from actors.reward import RewardWorker
from actors.rollout import prompt_seeds
from item_index.ragged import RaggedArray
from learner.srpo import allowed_in, response_log_probabilities

pytestmark = pytest.mark.engines
MODES = ["direct", "reasoning"] * 6
EXCLUDED = [[row, (row + 7) % 30, (row + 13) % 30] if row % 3 else [] for row in range(len(MODES))]


@pytest.fixture(scope="module")
def rollouts(tiny, rollout_engine):
    prompts = tiny.prompts(MODES, excluded=EXCLUDED)
    return rollout_engine.generate(prompts, responses=6, seeds=prompt_seeds(0, 1, len(MODES)))


def test_per_token_log_probabilities_agree(tiny, rollouts):
    allowed = allowed_in(rollouts, tiny.constraint).allowed
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    learner = response_log_probabilities(
        policy_of(tiny.model), rollouts, allowed, masks, temperature=1.0, micro_batch_tokens=2048
    ).numpy()
    sampler = rollouts.log_probabilities.values
    reasoning = np.repeat(rollouts.prompts.reasoning[rollouts.group_of_response], rollouts.responses.lengths)
    for mode in (False, True):
        rows = reasoning == mode
        assert np.abs(learner[rows] - sampler[rows]).max() < 2e-3
        chosen = rows & allowed.has_choice
        assert chosen.any()
        assert abs(np.exp(learner[chosen] - sampler[chosen]).mean() - 1) < 1e-3
    assert np.abs(sampler[~allowed.has_choice]).max() < 1e-6
    assert sampler[allowed.has_choice].min() < -0.1, "the tiny model must leave something to choose"


@pytest.mark.parametrize("mini_batch_prompts", [12, 4])
def test_at_learning_rate_zero_the_update_changes_nothing_and_all_ratios_are_one(
    tiny, rollouts, ray_cluster, mini_batch_prompts
):
    learner = LearnerActor.options(num_cpus=1).remote(
        str(tiny.checkpoint), seed=0, threads=2,
        engine={
            "learning_rate": 0.0, "weight_decay": 0.1, "warm_up_steps": 0, "total_steps": 1, "schedule": "constant",
            "gradient_clip": 1.0, "zero_stage": 2,
        },
    )  # fmt: skip
    learner.prepare_srpo.remote(
        str(tiny.index_folder), {}, temperature=1.0, mini_batch_prompts=mini_batch_prompts, micro_batch_tokens=2048,
        seed=0,
    )  # fmt: skip
    (before,) = ray.get(list(learner.weight_chunks.options(num_returns="streaming").remote(2**30)), timeout=300)
    advantages = RaggedArray(
        np.random.default_rng(0).normal(size=len(rollouts.responses)).astype(np.float32), rollouts.group_starts
    )
    members = [(0, group) for group in range(len(rollouts))]
    metrics = ray.get(learner.update.remote(members, advantages, rollouts), timeout=300)
    assert abs(metrics["ratio"] - 1) < 1e-3
    assert abs(metrics["importance"] - 1) < 1e-3
    assert abs(metrics["sampler_ratio"] - 1) < 1e-3
    assert metrics["sampler_gap_maximum"] < 2e-3
    assert metrics["kl"] < 1e-6
    assert metrics["gradient_norm"] > 0
    (after,) = ray.get(list(learner.weight_chunks.options(num_returns="streaming").remote(2**30)), timeout=60)
    assert (before.version, after.version) == (0, 1)
    assert after.names == before.names
    assert [array.tobytes() for array in after.arrays] == [array.tobytes() for array in before.arrays]
    ray.kill(learner)


def test_every_response_answers_with_an_item_that_is_not_excluded(tiny, rollouts):
    worker = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint))
    scores = worker.score(rollouts)
    assert scores.valid.all()
    group_R = rollouts.group_of_response
    for group, excluded in enumerate(EXCLUDED):
        assert not set(scores.items[group_R == group].tolist()) & set(excluded)
    assert (scores.lengths <= rollouts.prompts.budgets[group_R]).all()
    direct = ~rollouts.prompts.reasoning[group_R]
    assert scores.well_formed[direct].all()
    # A random model writes no step markers: format is not earned by the constraint alone.
    assert not scores.well_formed[~direct].any()


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(tiny, rollout_engine, rollouts):
    prompts = tiny.prompts(MODES, excluded=EXCLUDED)
    again = rollout_engine.generate(prompts, responses=6, seeds=prompt_seeds(0, 1, len(MODES)))
    assert again.responses.values.tolist() == rollouts.responses.values.tolist()
    assert again.responses.offsets.tolist() == rollouts.responses.offsets.tolist()
    other = rollout_engine.generate(prompts, responses=6, seeds=prompt_seeds(1, 1, len(MODES)))
    assert other.responses.values.tolist() != rollouts.responses.values.tolist()


def test_a_request_for_another_index_version_or_without_a_budget_is_refused(rollout_engine, tiny):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    prompt = {"prompt_token_ids": tiny.prompts(["direct"]).tokens[0].tolist()}
    for extra, message in (({"mode": "quick", "index_version": "x"}, "mode"), ({"mode": "direct"}, "index_version")):
        with pytest.raises(VLLMValidationError, match=message):
            rollout_engine.llm.generate(
                [prompt], SamplingParams(max_tokens=6, extra_args={"gream": extra}), use_tqdm=False
            )
