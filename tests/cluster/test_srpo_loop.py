"""The loop on real engines: taking turns, working ahead, and losing an engine in the middle of a step."""

import copy
import os
import signal

import numpy as np
import pytest
import ray
import torch
from tiny import policy_of
from tiny_loop import tiny_loop, weights

from actors.rollout import prompt_seeds
from item_index.ragged import RaggedArray
from learner.advantages import group_advantages
from learner.rollout_files import read_trained_groups
from learner.rollouts import allowed_in
from learner.srpo import response_log_probabilities

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
STEPS = 4


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, ray_cluster):
    """Starts actors and loop on the tiny checkpoint."""

    def started(*more):
        return tiny_loop(tiny, tmp_path_factory.mktemp("loop"), f"train.steps={STEPS}", *more)

    return started


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name in some:
        assert torch.equal(some[name], others[name]), name


@pytest.fixture(scope="module")
def undisturbed(run):
    """Weights and metrics of a run in which engine and learner take turns."""
    with run() as (loop, actors, _):
        metrics = [loop.step(step) for step in range(1, STEPS + 1)]
        loop.settle()
        return weights(actors), metrics


def test_without_staleness_the_run_is_the_synchronous_algorithm_bit_for_bit(tiny, run, undisturbed):
    """The algorithm once more, with nothing of scheduler, loop and timers: generate, score, update, transfer."""
    with run() as (loop, actors, source):
        train, sampler = loop.settings.train, loop.scheduler.sampler
        rates = {False: [0.0, 0.0], True: [0.0, 0.0]}  # groups with variance, groups
        numbers = 0
        for _step in range(STEPS):
            quota = {False: 4, True: 2}
            chosen = {False: [], True: []}
            for _round in range(train.generation_rounds):
                counts = {}
                for mode in quota:
                    missing = quota[mode] - len(chosen[mode])
                    rate = max(rates[mode][0] / rates[mode][1], 0.25) if rates[mode][1] else 1.0
                    counts[mode] = int(np.ceil(missing / rate)) if missing > 0 else 0
                if not sum(counts.values()):
                    break
                modes = [name for flag, name in ((False, "direct"), (True, "reasoning")) for _ in range(counts[flag])]
                drawn = [sampler.draw(counts[flag], name) for flag, name in ((False, "direct"), (True, "reasoning")) if counts[flag]]  # fmt: skip  # noqa: E501
                prompts = source.prompts(np.concatenate(drawn), modes)
                seeds = prompt_seeds(loop.settings.seed, 1, len(prompts), numbers)
                numbers += len(prompts)
                (call,) = actors.engines.generate(prompts, responses=train.responses, seeds=seeds, temperature=1.0)
                actors.engines.wait([call])
                batch = ray.get(call.references[0], timeout=60)
                (scores,) = actors.rewards.score([ray.put(batch)], [len(batch)], responses=6)
                rewards_GN = scores.rewards.reshape(len(batch), -1)
                hits_GN = scores.hits.reshape(len(batch), -1)
                varied = rewards_GN.max(1) - rewards_GN.min(1) > 1e-6
                for mode in quota:
                    rows = prompts.reasoning == mode
                    rates[mode] = [0.8 * rates[mode][0] + varied[rows].sum(), 0.8 * rates[mode][1] + rows.sum()]
                for row in np.nonzero(varied)[0]:
                    chosen[bool(prompts.reasoning[row])].append((batch, int(row), rewards_GN[row], hits_GN[row]))
            groups = [group for mode in quota for group in chosen[mode][: quota[mode]]]
            advantages_R = group_advantages(
                torch.from_numpy(np.concatenate([group[2] for group in groups])),
                torch.from_numpy(np.concatenate([group[3] for group in groups])),
                torch.full((len(groups),), train.responses), "bonus_calibrated", k=train.pass_k,
            )  # fmt: skip
            batches = list({id(group[0]): group[0] for group in groups}.values())
            members = [(next(i for i, b in enumerate(batches) if b is group[0]), group[1]) for group in groups]
            offsets = np.arange(len(groups) + 1) * train.responses
            actors.learner.update(
                np.array(members), RaggedArray(advantages_R.numpy(), offsets), [ray.put(batch) for batch in batches]
            )
            actors.engines.wait(actors.send_weights())
        by_hand = weights(actors)
    trained, metrics = undisturbed
    assert_equal(trained, by_hand)
    assert all(one["staleness_maximum"] == one["learner/staleness"] == 0 for one in metrics)
    assert sum(one["rounds"] for one in metrics) > STEPS, "groups without variance were made good"
    before = tiny.model.state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)


def test_an_engine_that_is_killed_in_the_middle_of_a_step_changes_nothing(run, undisturbed, monkeypatch):
    with run() as (loop, actors, _):
        kills = []
        generate = actors.engines.generate

        def generate_and_kill(prompts, **arguments):
            """Generation of the third round begins, and the engine is killed: by the signal, not by a message."""
            calls = generate(prompts, **arguments)
            kills.append(len(prompts))
            if len(kills) == 3:
                os.kill(ray.get(actors.engines.engines[0].actor.health.remote(), timeout=60)[1], signal.SIGKILL)
            return calls

        monkeypatch.setattr(actors.engines, "generate", generate_and_kill)
        metrics = [loop.step(step) for step in range(1, STEPS + 1)]
        trained = weights(actors)
    assert metrics[-1]["engine_restarts"] == 1
    expected, undisturbed_metrics = undisturbed
    for one, other in zip(metrics, undisturbed_metrics, strict=True):
        for name in ("groups_generated", "groups_trained", "weight_version"):
            assert one[name] == other[name], name
    for name in expected:
        # A new engine has another prefix cache, so the last digits of its log-probabilities may differ.
        torch.testing.assert_close(trained[name], expected[name], atol=1e-4, rtol=1e-3)


def test_working_ahead_trains_on_rollouts_of_the_stamped_version_and_of_none_too_old(tiny, run):
    by_version, metrics, batches = {}, [], {}
    with run("train.max_staleness=2", "train.dump_rollouts=true", "train.steps=6") as (loop, actors, _):
        by_version[0] = weights(actors)
        for step in range(1, 7):
            metrics.append(loop.step(step))
            by_version[step] = weights(actors)
        loop.settle()
        for step, file in enumerate(sorted((loop.settings.folder / "rollouts").glob("step-*.parquet")), start=1):
            batches[step] = read_trained_groups(file).batch
    assert max(one["staleness_maximum"] for one in metrics) == 2
    assert metrics[-1]["weight_gap"] < 2e-3
    assert metrics[-1]["weights_compared"] == 1.0
    assert len(batches) == 6
    seen = set()
    for step, batch in batches.items():
        for version in np.unique(batch.weight_versions):
            assert 0 <= step - 1 - version <= 2
            part = batch.select(np.nonzero(batch.weight_versions == version)[0])
            gaps = {other: largest_gap(tiny, by_version[other], part) for other in (version, version + 1)}
            assert gaps[version] < 2e-3 < gaps[version + 1], (step, version, gaps)
            seen.add(step - 1 - int(version))
    assert seen == {0, 1, 2}


def largest_gap(tiny, weights_of_version, batch):
    """Between the sampler's log-probabilities and those under the weights of some version."""
    model = copy.deepcopy(tiny.model)
    model.load_state_dict(weights_of_version, strict=False)
    masks = torch.from_numpy(tiny.constraint.free_text_masks)
    values = response_log_probabilities(
        policy_of(model), batch, allowed_in(batch, tiny.constraint).allowed, masks, temperature=1.0,
        micro_batch_tokens=2048,
    )  # fmt: skip
    return float(np.abs(values.numpy() - batch.log_probabilities.values).max())
