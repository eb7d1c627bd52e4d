"""vLLM's own weight transfer from a real learner into a real engine, by a transport of the tests, for NCCL and CUDA IPC
need GPUs; and an engine that is spread over two processes."""

import copy

import numpy as np
import pytest
import ray
import torch
from handed_over_weights import ReceivingEngine, SendingLearner
from tiny import policy_of

from actors.reward import RewardWorker
from actors.rollout import ENVIRONMENT, RolloutActor, environment, prompt_seeds
from cluster.settings import load_settings
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from learner.rollouts import allowed_in
from learner.srpo import response_log_probabilities
from learner.weight_chunks import weight_chunks

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
MODES = ["direct", "reasoning"] * 3


@pytest.fixture
def pair(tiny, ray_cluster):
    """An engine and a learner whose weights differ from its by one update."""
    options = {"runtime_env": {"env_vars": {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}}, "num_cpus": 1}
    checkpoint, index = str(tiny.checkpoint), str(tiny.index_folder)
    engine = (
        ray.remote(concurrency_groups={"health": 1})(ReceivingEngine)
        .options(**options)
        .remote(checkpoint, index, maximum_tokens=256, sequences=64, kv_cache_mib=64)
    )
    learner = ray.remote(SendingLearner).options(**options).remote(
        checkpoint, seed=0, threads=1,
        engine={
            "learning_rate": 1e-2, "weight_decay": 0.0, "warm_up_steps": 0, "total_steps": 1, "schedule": "constant",
            "gradient_clip": 1.0, "zero_stage": 3,
        },
    )  # fmt: skip
    learner.prepare_srpo.remote(index, {}, temperature=1.0, mini_batch_prompts=6, micro_batch_tokens=2048, seed=0)
    batch = tiny.random_rollouts(tiny.prompts(MODES), responses=4, seed=0)
    advantages = RaggedArray(np.random.default_rng(0).normal(size=24).astype(np.float32), batch.group_starts)
    members = np.array([(0, group) for group in range(len(MODES))])
    ray.get(learner.update.remote(members, advantages, batch), timeout=300)
    yield engine, learner
    for actor in (engine, learner):
        ray.kill(actor)


def probed(actor, tokens):
    return ray.get(actor.probe_weights.remote(tokens), timeout=120).log_probabilities_T


def test_weights_arrive_whole_and_a_transfer_that_breaks_off_ends_the_sampling(tiny, pair):
    engine, learner = pair
    prompts = tiny.prompts(MODES)
    tokens = np.array([*prompts.tokens[0], *tiny.builder.item_tokens[3]])
    assert np.abs(probed(engine, tokens) - probed(learner, tokens)).max() > 2e-3
    declared, sent = ray.get(learner.send_by_hand.remote([engine], bucket_bytes=60_000), timeout=120)
    assert sent == declared
    assert len(sent) == len(tiny.model.state_dict())
    assert np.abs(probed(engine, tokens) - probed(learner, tokens)).max() < 2e-3
    assert ray.get(engine.weight_version.remote(), timeout=60) == 1
    generated = ray.get(engine.generate.remote(prompts, responses=2, seeds=prompt_seeds(1, 1, 6)), timeout=120)
    assert (generated.weight_versions == 1).all()

    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(learner.send_by_hand.remote([engine], bucket_bytes=60_000, break_off=True), timeout=120)
    with pytest.raises(RuntimeError, match="weights of version 1 have come in part over those of version 1; start it"):
        ray.get(engine.generate.remote(prompts, responses=2, seeds=prompt_seeds(1, 1, 6)), timeout=120)
    assert ray.get(engine.weight_version.remote(), timeout=60) == 1


def test_an_engine_of_two_devices_samples_from_the_same_policy_and_follows_an_update(tiny, ray_cluster):
    variables = {**environment("v1", tensor_parallel=2), "OMP_NUM_THREADS": "1"}
    engine = RolloutActor.options(runtime_env={"env_vars": variables}, num_cpus=1).remote(
        str(tiny.checkpoint), str(tiny.index_folder), maximum_tokens=256, sequences=64, kv_cache_mib=64,
        tensor_parallel=2,
    )  # fmt: skip
    assert ray.get(engine.sampler_in_use.remote(), timeout=200) == "plain: the model runs on several devices"
    prompts = tiny.prompts(MODES)
    worker = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint))
    other = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    for version, model in ((0, tiny.model), (4, other)):
        if version:
            chunks = list(weight_chunks([list(model.state_dict().items())], version, tied_head=False))
            assert ray.get(engine.update_weights.remote(chunks), timeout=120) == version
        batch = ray.get(engine.generate.remote(prompts, responses=4, seeds=prompt_seeds(1, 1, 6)), timeout=200)
        allowed = allowed_in(batch, tiny.constraint).allowed
        expected = response_log_probabilities(
            policy_of(model), batch, allowed, masks, temperature=1.0, micro_batch_tokens=2048
        )
        assert np.abs(expected.numpy() - batch.log_probabilities.values).max() < 2e-3
        assert worker.score(batch).valid.all()
    ray.kill(engine)


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_a_transfer_between_devices_without_devices_is_refused(transfer):
    with pytest.raises(InputError, match=f"cluster.weight_transfer {transfer} needs GPUs: set cluster.gpus_per_engine"):
        load_settings(None, [f"cluster.weight_transfer={transfer}"])
    assert load_settings(None, [f"cluster.weight_transfer={transfer}", "cluster.gpus_per_engine=1"])
