"""The same update of the policy by any number of ranks under any ZeRO stage, and what a learner refuses."""

import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from tiny import policy_of

from actors.learner import LearnerActor, meeting_place
from cluster.placement import await_stream
from item_index.ragged import RaggedArray
from learner.rollouts import allowed_in, in_answer, true_answers
from learner.srpo import micro_batch
from learner.weight_chunks import tensors_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
MODES = ["direct", "reasoning", "reasoning", "direct", "direct", "reasoning"]
UPDATES = 5


def engine_arguments(zero_stage, **more):
    return {
        "learning_rate": 1e-3, "weight_decay": 0.1, "warm_up_steps": 0, "total_steps": 1, "schedule": "constant",
        "gradient_clip": 1.0, "zero_stage": zero_stage, **more,
    }  # fmt: skip


def start(tiny, *, ranks, zero_stage, low_rank=None, objective=None, srpo=None, **engine):
    """Learner ranks, prepared."""
    meeting = meeting_place() if ranks > 1 else None
    learner = [
        LearnerActor.options(num_cpus=0).remote(
            str(tiny.checkpoint), engine=engine_arguments(zero_stage, **engine), seed=0, threads=1, rank=rank,
            ranks=ranks, meeting_place=meeting, low_rank=low_rank,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    ray.get(
        [
            rank.prepare_srpo.remote(
                str(tiny.index_folder), objective or {},
                **{"temperature": 1.0, "mini_batch_prompts": 3, "micro_batch_tokens": 150, "seed": 0, **(srpo or {})},
            )
            for rank in learner
        ],
        timeout=300,
    )  # fmt: skip
    return learner


def rollouts(tiny, *, seed=0):
    """Random responses in groups of unequal size, and their advantages."""
    generator = np.random.default_rng(seed)
    batch = tiny.random_rollouts(tiny.prompts(MODES), responses=generator.permutation(np.arange(1, 7)), seed=seed)
    return batch, RaggedArray(generator.normal(size=len(batch.responses)).astype(np.float32), batch.group_starts)


def update(learner, batch, advantages):
    members = np.array([(0, group) for group in range(len(batch))])
    reference = ray.put(batch)
    return ray.get([rank.update.remote(members, advantages, reference) for rank in learner], timeout=300)


def weights(learner):
    streams = [rank.weight_chunks.options(num_returns="streaming").remote(50_000) for rank in learner]
    chunks, *of_others = [ray.get(await_stream(stream, "the weights", 300)) for stream in streams]
    assert len(chunks) > 3
    assert all(len(of_rank) == len(chunks) for of_rank in of_others), "all ranks go through every bucket"
    return {name: tensor.clone() for name, tensor in tensors_of(chunks)}


def trained(tiny, **how):
    """Change of all parameters by five updates, and the metrics of the last one."""
    learner = start(tiny, **how)
    before = weights(learner)
    for seed in range(UPDATES):
        metrics = update(learner, *rollouts(tiny, seed=seed))
    after = weights(learner)
    for rank in learner:
        ray.kill(rank)
    assert metrics[0]["skipped_steps"] == 0
    return {name: after[name] - before[name] for name in before}, metrics


@pytest.fixture(scope="module")
def alone(tiny, ray_cluster):
    """One rank without ZeRO."""
    return trained(tiny, ranks=1, zero_stage=0)


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_ranks_and_stages_change_the_parameters_alike(tiny, alone, ranks, zero_stage):
    expected, expected_metrics = alone
    change, metrics = trained(tiny, ranks=ranks, zero_stage=zero_stage)
    assert change.keys() == expected.keys()
    close = total = 0
    for name, wanted in expected.items():
        assert wanted.abs().max() > 0, name
        close += int(((change[name] - wanted).abs() <= 1e-3 * wanted.abs()).sum())
        total += wanted.numel()
    assert close >= 0.99 * total
    for of_rank in metrics:  # every rank reports the whole mini-batch
        for name in ("loss", "gradient_norm", "ratio", "ratio_maximum", "ratio_minimum", "kl", "entropy_estimate"):
            assert of_rank[name] == pytest.approx(expected_metrics[0][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_optimizer_in_the_hosts_memory_changes_the_parameters_alike(tiny, alone, zero_stage):
    expected, _ = alone
    change, _ = trained(tiny, ranks=1, zero_stage=zero_stage, offload_optimizer=True)
    close = [(change[name] - wanted).abs() <= 1e-3 * wanted.abs() for name, wanted in expected.items()]
    assert torch.cat([flags.flatten() for flags in close]).float().mean() >= 0.99


def test_in_half_precision_the_parameters_move_the_same_way(tiny, alone):
    expected, expected_metrics = alone
    change, metrics = trained(tiny, ranks=1, zero_stage=2, dtype="bfloat16")
    one, other = (torch.cat([of[name].float().flatten() for name in sorted(expected)]) for of in (change, expected))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95
    assert metrics[0]["entropy_estimate"] == pytest.approx(expected_metrics[0]["entropy_estimate"], rel=0.02)


def test_beside_low_rank_weights_their_base_is_the_reference_and_they_are_merged_on_the_way_out(tiny, ray_cluster):
    low_rank = {"rank": 4, "alpha": 8, "dropout": 0.0, "modules": ("q_proj", "down_proj")}
    learner = start(tiny, ranks=1, zero_stage=2, low_rank=low_rank, learning_rate=1e-2)
    before = weights(learner)
    kl = [update(learner, *rollouts(tiny))[0]["kl"] for _ in range(2)]
    after = weights(learner)
    ray.kill(learner[0])
    assert after.keys() == before.keys() == safetensors.torch.load_file(tiny.checkpoint / "model.safetensors").keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    assert kl[1] > kl[0] > 0  # the second mini-batch of the first update already sees a policy that has moved


def test_the_valid_mass_is_measured_on_demand_and_rises_where_it_is_a_gain(tiny, ray_cluster):
    plain = start(tiny, ranks=1, zero_stage=2)
    assert "valid_mass" not in update(plain, *rollouts(tiny))[0]
    ray.kill(plain[0])
    batch, advantages = rollouts(tiny)
    nothing = RaggedArray(np.zeros_like(advantages.values), advantages.offsets)
    learner = start(tiny, ranks=2, zero_stage=2, objective={"valid_mass_coefficient": 1.0, "kl_coefficient": 0.0})
    mass = [update(learner, batch, nothing)[0]["valid_mass"] for _ in range(4)]
    for rank in learner:
        ray.kill(rank)
    assert 0 < mass[0] < mass[-1] < 1
    assert mass == sorted(mass)


def test_true_answers_become_likelier_behind_the_policys_own_chains(tiny, ray_cluster):
    plain = start(tiny, ranks=1, zero_stage=2)
    batch, advantages = rollouts(tiny)
    assert "true_answer_log_probability" not in update(plain, batch, advantages)[0]
    ray.kill(plain[0])
    nothing = RaggedArray(np.zeros_like(advantages.values), advantages.offsets)
    objective = {"true_answer_coefficient": 1.0, "kl_coefficient": 0.0}
    found = {}
    for ranks in (1, 2):
        learner = start(tiny, ranks=ranks, zero_stage=2, objective=objective)
        found[ranks] = [update(learner, batch, nothing)[0]["true_answer_log_probability"] for _ in range(4)]
        for rank in learner:
            ray.kill(rank)
    assert found[1] == sorted(found[1])
    assert found[1][-1] - found[1][0] > 0.1
    assert found[2] == pytest.approx(found[1], rel=1e-3)


def test_the_gradient_of_true_answers_is_that_of_their_mean_log_probability(tiny, ray_cluster):
    """One optimizer step with all groups, no advantages and no penalty, against answers that are read one by one."""
    batch, advantages = rollouts(tiny)
    nothing = RaggedArray(np.zeros_like(advantages.values), advantages.offsets)
    learner = start(tiny, ranks=1, zero_stage=0, objective={"true_answer_coefficient": 0.5, "kl_coefficient": 0.0},
                    srpo={"mini_batch_prompts": len(batch)})  # fmt: skip
    metrics = update(learner, batch, nothing)[0]
    ray.kill(learner[0])

    policy, masks = policy_of(tiny.model), torch.from_numpy(tiny.constraint.free_text_masks)
    answers, values = true_answers(batch, tiny.constraint), []
    for group in range(len(answers)):
        one = answers.select(np.array([group]))
        allowed = allowed_in(one, tiny.constraint).allowed
        counted = allowed.has_choice & in_answer(one, tiny.constraint)
        values.append(policy(micro_batch(one, np.array([0]), allowed).packed, allowed, masks)[counted])
    loss = -0.5 * MODES.count("reasoning") / len(MODES) * torch.cat(values).mean()
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert metrics["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_second_epoch_moves_the_ratio_away_from_one(tiny, ray_cluster):
    learner = start(tiny, ranks=1, zero_stage=2, srpo={"epochs": 2})
    metrics = update(learner, *rollouts(tiny))[0]
    assert metrics["ratio_minimum"] < 0.99
    assert metrics["ratio_maximum"] > 1.01
    assert metrics["clipped"] > 0
    assert metrics["tokens_per_second"] > 0
    ray.kill(learner[0])


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(tiny, ray_cluster):
    learner = start(tiny, ranks=2, zero_stage=2, maximum_skipped_steps=3)
    before = weights(learner)
    batch, advantages = rollouts(tiny)
    broken = RaggedArray(np.full_like(advantages.values, np.inf), advantages.offsets)
    metrics = update(learner, batch, broken)  # two mini-batches
    assert [of_rank["skipped_steps"] for of_rank in metrics] == [2, 2]
    after = weights(learner)
    assert all(torch.equal(after[name], before[name]) for name in before)

    metrics = update(learner, batch, advantages)
    assert metrics[0]["skipped_steps"] == 0
    changed = weights(learner)
    assert all(weight.isfinite().all() for weight in changed.values())
    assert any(not torch.equal(changed[name], before[name]) for name in before)

    update(learner, batch, broken)
    with pytest.raises(ray.exceptions.RayTaskError, match="4 optimizer steps in a row"):
        update(learner, batch, broken)
    for rank in learner:
        ray.kill(rank)


def test_rollouts_under_another_index_are_refused(tiny, ray_cluster):
    learner = start(tiny, ranks=1, zero_stage=2)
    batch, advantages = rollouts(tiny)
    object.__setattr__(batch, "index_version", "another")
    with pytest.raises(ray.exceptions.RayTaskError, match="sampled under index version another"):
        update(learner, batch, advantages)
    ray.kill(learner[0])
