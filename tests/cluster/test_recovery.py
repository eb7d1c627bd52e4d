"""States of the loop: what they hold, damaged ones, and learner ranks that are lost, on real engines and ranks."""

import os
import signal

import pytest
import ray
import torch
from tiny_loop import tiny_loop, weights

from cluster.alarms import Alarms
from cluster.placement import WorkLost
from cluster.recovery import Recovery
from cluster.validation import BestCheckpoint

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


def recovery_of(loop, actors, name="name"):
    settings = loop.settings
    alarms, best = Alarms(settings.train.alarms), BestCheckpoint(settings.folder)
    return Recovery(settings, settings.folder / "train", name, actors, loop, alarms, best)


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name in some:
        assert torch.equal(some[name], others[name]), name


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("storage", ["folder", "uri"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_used(tiny, ray_cluster, tmp_path, capsys, storage):
    """A flipped byte in the learner's part, then a missing file, then nothing whole is left."""
    more = [f"cluster.state_storage=file://{tmp_path / 'states'}"] if storage == "uri" else []
    states = tmp_path / ("states/run/train" if storage == "uri" else "run/train/states") / "name"
    with tiny_loop(tiny, tmp_path / "run", "train.kept_states=3", *more) as (loop, actors, _):
        recovery, after = recovery_of(loop, actors), {}
        for step in (1, 2, 3, 4):
            loop.step(step)
            recovery.write(step)
            after[step] = weights(actors)
        assert sorted(folder.name for folder in states.iterdir()) == ["step-000002", "step-000003", "step-000004"]
        (newest,) = (states / "step-000004" / "ranks" / "state").rglob("*optim_states.pt")
        flip_a_byte(newest)
        assert recovery.resume() == 3
        said = capsys.readouterr().out.replace("\n", "")
        assert "the state of step 4 is damaged" in said
        assert newest.name in said
        assert_equal(weights(actors), after[3])
        loop.step(4)
        assert_equal(weights(actors), after[4])

        (states / "step-000003" / "ranks" / "random-0.safetensors").unlink()
        (states / "step-000004" / "loop.json").unlink()
        assert recovery.resume() == 2
        said = capsys.readouterr().out.replace("\n", "")
        assert "random-0.safetensors: the state lacks this file" in said
        assert "loop.json: the state lacks this file" in said
        assert_equal(weights(actors), after[2])
        flip_a_byte(states / "step-000002" / "manifest.json")
        assert recovery.resume() == 0, "nothing whole is left"
        recovery_of(loop, actors, name="other")
        assert not states.exists(), "states of another name are taken away"


def test_a_state_keeps_surplus_groups_and_what_the_engines_were_given(tiny, ray_cluster, tmp_path):
    more = ["train.max_staleness=2", "train.steps=9", "train.kept_states=9"]
    with tiny_loop(tiny, tmp_path, *more) as (loop, actors, _):
        recovery = recovery_of(loop, actors)
        found = None
        for step in range(1, 9):
            loop.step(step)
            recovery.write(step)
            if loop.scheduler.surplus and loop.scheduler.rounds:
                found = step, loop.scheduler.state(), [batch_of(group) for group in loop.scheduler.surplus]
        assert found, "no step left groups for a later one"
        step, scheduler, surplus = found
        for later in [folder for folder in recovery.states.steps() if folder > step]:
            recovery.states.storage.delete_dir(f"{recovery.states.path}/step-{later:06d}")
        assert recovery.resume() == step
        assert loop.scheduler.state() == scheduler
        assert loop.version == step
        for group, (responses, version) in zip(loop.scheduler.surplus, surplus, strict=True):
            again = batch_of(group)
            assert [tokens.tolist() for tokens in again[0]] == [tokens.tolist() for tokens in responses]
            assert again[1] == version == group.weight_version
        metrics = loop.step(step + 1)
        assert metrics["staleness_maximum"] <= 2
        assert metrics["groups_trained"] + metrics["groups_missing"] == 6


def batch_of(group):
    batch = ray.get(group.batch, timeout=60)
    return batch.responses_of(group.place), int(batch.weight_versions[group.place])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_learner_rank_that_is_killed_takes_the_step_with_it_and_the_loop_goes_back(
    tiny, ray_cluster, tmp_path, capsys, ranks
):
    """The last rank is killed before there is a state, and again after one was written."""
    more = [f"train.ranks={ranks}", "cluster.learner_cpus=0.5", "cluster.rollout_cpus=0.5"]
    with tiny_loop(tiny, tmp_path, *more) as (loop, actors, _):
        recovery, after = recovery_of(loop, actors), {}

        def kill():
            _, process = ray.get(actors.learner.ranks[-1].health.remote(), timeout=60)
            os.kill(process, signal.SIGKILL)

        loop.step(1)
        after[1] = weights(actors)
        kill()
        with pytest.raises(WorkLost, match="learner rank") as caught:
            loop.step(2)
        assert recovery.go_back(caught.value) == 0
        loop.step(1)
        assert_equal(weights(actors), after[1])
        recovery.write(1)
        loop.step(2)
        after[2] = weights(actors)
        kill()
        with pytest.raises(WorkLost) as caught:
            loop.step(3)
        assert recovery.go_back(caught.value) == 1
        assert_equal(weights(actors), after[1])
        loop.step(2)
        assert_equal(weights(actors), after[2])
        assert actors.learner.restarts == 2
        said = capsys.readouterr().out
        assert "the learner is started anew" in said


def test_too_many_losses_without_a_state_in_between_end_the_run(tiny, ray_cluster, tmp_path):
    with tiny_loop(tiny, tmp_path, "cluster.maximum_restarts=1") as (loop, actors, _):
        recovery = recovery_of(loop, actors)
        assert recovery.go_back(WorkLost("learner rank 0 is gone")) == 0
        with pytest.raises(RuntimeError, match=r"2 losses since the last state, the latest: learner rank 0 is gone"):
            recovery.go_back(WorkLost("learner rank 0 is gone"))
