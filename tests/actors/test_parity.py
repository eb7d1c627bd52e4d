"""The parity gate: sampler (real vLLM) and learner read the same policy, in both modes."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from tiny import policy_of

from actors.learner import LearnerActor
from actors.reward import RewardWorker
from actors.rollout import ENVIRONMENT, RolloutActor, prompt_seeds
from item_index.constraint import ConstraintViolation
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutPrompts, allowed_in
from learner.srpo import response_log_probabilities

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


@pytest.mark.parametrize(("temperature", "responses"), [(0.7, 1), (0.7, 16), (1.0, 16)])
def test_log_probabilities_agree_at_any_temperature_and_group_size(tiny, rollout_engine, temperature, responses):
    """Modes mixed in one batch, exclusions, budgets that force the closing, and prompts whose beginnings are cached."""
    modes = MODES * 2
    prompts = tiny.prompts(modes, excluded=EXCLUDED * 2)
    tight = tiny.constraint.closing_length + 3
    budgets = np.where(prompts.reasoning & (np.arange(len(modes)) % 4 == 1), tight, prompts.budgets).astype(np.int32)
    prompts = replace(prompts, budgets=budgets)
    # Each prompt once more with a history that goes on: all but its end is in the prefix cache by then.
    longer = [np.concatenate([tokens[:-2], tokens]) for tokens in prompts.tokens]
    prompts = RolloutPrompts.concatenate([prompts, replace(prompts, tokens=RaggedArray.of(longer, np.int32))])
    for round_number in range(2):  # the second time every prompt is cached
        seeds = prompt_seeds(21, round_number, len(prompts))
        batch = rollout_engine.generate(prompts, responses=responses, seeds=seeds, temperature=temperature)
        assert batch.group_sizes.tolist() == [responses] * len(prompts)
        within = allowed_in(batch, tiny.constraint)
        learner = response_log_probabilities(
            policy_of(tiny.model), batch, within.allowed, torch.from_numpy(tiny.constraint.free_text_masks),
            temperature=temperature, micro_batch_tokens=2048,
        ).numpy()  # fmt: skip
        assert np.abs(learner - batch.log_probabilities.values).max() < 2e-3
        reasoning_R = prompts.reasoning[batch.group_of_response]
        assert within.forced_R[reasoning_R].any()
        assert not within.forced_R[~reasoning_R].any()
        scores = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint)).score(batch)
        assert scores.valid.all()
        for group, excluded in enumerate(prompts.excluded):
            assert not np.isin(scores.items[batch.group_of_response == group], excluded).any()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_responses_all_answer_with_an_item_that_was_not_excluded(tiny, rollout_engine):
    worker = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint))
    modes = ["direct", "direct", "direct", "reasoning"] * 16
    generator = np.random.default_rng(0)
    answered = 0
    for round_number in range(25):
        excluded = [generator.permutation(len(tiny.index))[: generator.integers(0, 25)].tolist() for _ in modes]
        prompts = tiny.prompts(modes, budget=32, excluded=excluded)
        seeds = prompt_seeds(22, round_number, len(modes))
        scores = worker.score(rollout_engine.generate(prompts, responses=64, seeds=seeds))
        assert scores.valid.all()
        for group, items in enumerate(scores.items.reshape(len(modes), -1)):
            assert not np.isin(items, excluded[group]).any()
        answered += len(scores.items)
    assert answered >= 100_000


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
    members = np.array([(0, group) for group in range(len(rollouts))])
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


def test_without_the_constraint_sampler_and_learner_read_the_same_policy_too(tiny, ray_cluster):
    engine = RolloutActor.options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT}).remote(
        str(tiny.checkpoint), str(tiny.index_folder), maximum_tokens=256, sequences=64, kv_cache_mib=64, threads=2,
        constrained=False,
    )  # fmt: skip
    prompts, seeds = tiny.prompts(MODES, budget=40), prompt_seeds(0, 1, len(MODES))
    batch = ray.get(engine.generate.remote(prompts, responses=6, seeds=seeds), timeout=240)
    ray.kill(engine)
    free = replace(tiny.constraint, constrained=False)
    learner = response_log_probabilities(
        policy_of(tiny.model), batch, allowed_in(batch, free).allowed, torch.from_numpy(free.free_text_masks),
        temperature=1.0, micro_batch_tokens=2048,
    ).numpy()  # fmt: skip
    assert np.abs(learner - batch.log_probabilities.values).max() < 2e-3
    scores = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint), constrained=False).score(batch)
    assert scores.valid.mean() < 0.5  # a model that knows nothing seldom answers with an item of its own accord
    assert not scores.forced.any()
    with pytest.raises(ConstraintViolation):
        RewardWorker(str(tiny.index_folder), str(tiny.checkpoint)).score(batch)


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
