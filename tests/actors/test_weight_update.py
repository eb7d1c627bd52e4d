"""Weights from the learner to a running engine: outputs, log-probabilities and version follow."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from tiny import make_tiny, policy_of
from transformers import LlamaForCausalLM

from actors.learner import LearnerActor
from actors.rollout import ENVIRONMENT, RolloutActor, prompt_seeds
from cluster.placement import await_stream
from item_index.ragged import RaggedArray
from learner.policy import load_language_model
from learner.rollouts import allowed_in
from learner.srpo import response_log_probabilities
from learner.weight_chunks import weight_chunks
from learner.weight_probe import different_weights, learner_sum

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
MODES = ["direct", "reasoning"] * 4


def largest_gap(tiny, model, batch):
    """Largest difference between the sampler's and a model's log-probabilities."""
    allowed = allowed_in(batch, tiny.constraint).allowed
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    values = response_log_probabilities(
        policy_of(model), batch, allowed, masks, temperature=1.0, micro_batch_tokens=2048
    )
    return float(np.abs(values.numpy() - batch.log_probabilities.values).max())


def perturbed(model, seed):
    """A copy of a model with other weights."""
    torch.manual_seed(seed)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({name: w + 0.05 * w.std() * torch.randn_like(w) for name, w in model.state_dict().items()})
    copy.tie_weights()
    return copy.eval()


def as_chunks(model, version, *, tensors=3):
    """The weights of a model, a few tensors a chunk."""
    named = list(model.state_dict().items())
    buckets = [named[first : first + tensors] for first in range(0, len(named), tensors)]
    return list(weight_chunks(buckets, version, tied_head=model.config.tie_word_embeddings))


def test_outputs_and_log_probabilities_follow_the_new_weights(tiny, rollout_engine):
    prompts, seeds = tiny.prompts(MODES), prompt_seeds(3, 1, len(MODES))
    old = rollout_engine.generate(prompts, responses=4, seeds=seeds)
    new_model = perturbed(tiny.model, seed=1)
    try:
        assert rollout_engine.update_weights(as_chunks(new_model, 5)) == 5
        new = rollout_engine.generate(prompts, responses=4, seeds=seeds)
        assert (new.weight_versions == 5).all()
        assert new.responses.values.tolist() != old.responses.values.tolist()
        assert largest_gap(tiny, new_model, new) < 2e-3
        assert largest_gap(tiny, tiny.model, new) > 2e-3
    finally:
        rollout_engine.load_weights(str(tiny.checkpoint), 0)
    back = rollout_engine.generate(prompts, responses=4, seeds=seeds)
    assert back.responses.values.tolist() == old.responses.values.tolist()


def test_one_tensor_that_was_left_out_of_one_small_update_is_noticed(tiny, rollout_engine):
    tokens = np.array([*tiny.prompts(["direct"]).tokens[0], *tiny.builder.item_tokens[3]])
    state = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    sums = {name: learner_sum(weight) for name, weight in state.items()}
    before = rollout_engine.probe_weights(tokens)
    assert different_weights(sums, before.sums) == ([], len(state))
    for left_out in ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        torch.manual_seed(4)
        updated = state | {left_out: state[left_out] + 1e-6 * torch.randn(state[left_out].shape).sign()}
        wrong, _ = different_weights({name: learner_sum(weight) for name, weight in updated.items()}, before.sums)
        assert left_out in wrong
        assert all("layers.0.self_attn" in name or name == left_out for name in wrong), "what is fused with it at most"
        model = LlamaForCausalLM(tiny.model.config)
        model.load_state_dict(updated)
        ours = model(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1)
        gap = ours.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0].detach().numpy() - before.log_probabilities_T
        assert np.abs(gap).max() < 2e-3, "which log-probabilities alone would not have noticed"


def test_a_transfer_that_breaks_off_leaves_the_old_weights(tiny, rollout_engine):
    prompts, seeds = tiny.prompts(MODES), prompt_seeds(6, 1, len(MODES))
    old = rollout_engine.generate(prompts, responses=2, seeds=seeds)
    new = as_chunks(perturbed(tiny.model, seed=3), 7)

    def dies_after_two():
        yield from new[:2]
        raise ConnectionError("the learner is gone")

    for chunks, error in (
        (dies_after_two(), "the learner is gone"),
        (new[:-1], "end after .* chunks, before their last one"),
        ([new[0], new[2]], "chunk 1 was to come, and chunk 2 of version 7 came"),
        ([*as_chunks(tiny.model, 0)[:1], *new[1:]], "chunk 1 was to come, and chunk 1 of version 7 came"),
    ):
        with pytest.raises((ConnectionError, ValueError), match=error):
            rollout_engine.update_weights(chunks)
        assert rollout_engine.weight_version() == 0
    again = rollout_engine.generate(prompts, responses=2, seeds=seeds)
    assert again.responses.values.tolist() == old.responses.values.tolist()
    assert (again.weight_versions == 0).all()


def test_learner_and_rollout_actors_agree_on_weights_and_version_after_an_update(tiny, ray_cluster, tmp_path):
    environment = {"runtime_env": {"env_vars": {**ENVIRONMENT, "OMP_NUM_THREADS": "2"}}, "num_cpus": 1}
    checkpoint, index = str(tiny.checkpoint), str(tiny.index_folder)
    rollout = RolloutActor.options(**environment).remote(
        checkpoint, index, maximum_tokens=256, sequences=64, kv_cache_mib=64
    )
    learner = LearnerActor.options(**environment).remote(
        checkpoint, seed=0, threads=2,
        engine={
            "learning_rate": 1e-3, "weight_decay": 0.0, "warm_up_steps": 0, "total_steps": 1, "schedule": "constant",
            "gradient_clip": 1.0, "zero_stage": 2,
        },
    )  # fmt: skip
    learner.prepare_srpo.remote(index, {}, temperature=1.0, mini_batch_prompts=8, micro_batch_tokens=2048, seed=0)
    prompts, seeds = tiny.prompts(MODES), prompt_seeds(4, 1, len(MODES))
    batch = rollout.generate.remote(prompts, responses=4, seeds=seeds)
    advantages = RaggedArray.of(np.random.default_rng(0).normal(size=(len(MODES), 4)), np.float32)
    members = np.array([(0, group) for group in range(len(MODES))])
    metrics = ray.get(learner.update.remote(members, advantages, batch), timeout=300)
    assert metrics["staleness"] == 0
    stream = learner.weight_chunks.options(num_returns="streaming").remote(100_000)
    chunks = await_stream(stream, "the weights", 120)
    assert len(chunks) > 3
    assert ray.get(rollout.update_weights.remote(chunks), timeout=120) == 1
    assert ray.get(rollout.weight_version.remote(), timeout=60) == 1
    tokens = np.array([*prompts.tokens[0], *tiny.builder.item_tokens[3]])
    probes = [ray.get(actor.probe_weights.remote(tokens), timeout=120) for actor in (rollout, learner)]
    assert [probe.version for probe in probes] == [1, 1]
    ours, theirs = (probe.log_probabilities_T for probe in probes)
    assert len(ours) == len(tokens) - 1
    assert np.abs(ours - theirs).max() < 2e-3
    assert different_weights(probes[1].sums, probes[0].sums) == ([], len(tiny.model.state_dict()))
    fresh = ray.get(rollout.generate.remote(prompts, responses=4, seeds=seeds), timeout=120)
    assert fresh.responses.values.tolist() != ray.get(batch, timeout=60).responses.values.tolist()
    folder = ray.get(learner.save.remote(str(tmp_path / "saved")), timeout=120)
    assert largest_gap(tiny, load_language_model(folder), fresh) < 2e-3
    assert largest_gap(tiny, tiny.model, fresh) > 2e-3

    # Weights that do not fit are noticed in the middle of loading: some layers have the new ones, some the old.
    *whole, last = as_chunks(tiny.model, 2)
    unfitting = replace(last, arrays=tuple(array[:-1] for array in last.arrays))
    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(rollout.update_weights.remote([*whole, unfitting]), timeout=120)
    with pytest.raises(RuntimeError, match="loading weights over those of version 1 failed; start it anew"):
        ray.get(rollout.generate.remote(prompts, responses=4, seeds=seeds), timeout=120)
    for actor in (rollout, learner):
        ray.kill(actor)


def test_an_engine_with_tied_embeddings_follows_an_update(ray_cluster, tmp_path):
    tiny = make_tiny(tmp_path, tied=True)
    environment = {"runtime_env": {"env_vars": {**ENVIRONMENT, "OMP_NUM_THREADS": "2"}}, "num_cpus": 1}
    rollout = RolloutActor.options(**environment).remote(
        str(tiny.checkpoint), str(tiny.index_folder), maximum_tokens=256, sequences=64, kv_cache_mib=64
    )
    prompts, seeds = tiny.prompts(MODES), prompt_seeds(5, 1, len(MODES))
    assert largest_gap(tiny, tiny.model, ray.get(rollout.generate.remote(prompts, responses=4, seeds=seeds))) < 2e-3
    new_model = perturbed(tiny.model, seed=2)
    assert new_model.get_output_embeddings().weight is new_model.get_input_embeddings().weight
    ray.get(rollout.update_weights.remote(as_chunks(new_model, 1)), timeout=120)
    fresh = ray.get(rollout.generate.remote(prompts, responses=4, seeds=seeds), timeout=120)
    assert largest_gap(tiny, new_model, fresh) < 2e-3
    ray.kill(rollout)
