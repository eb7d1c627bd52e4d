"""`gream train` is interrupted, really, again and again, and ends as if nothing had happened: bit for bit."""

import os
import re
import signal

import psutil
import pytest
import torch
from train_runs import STEPS, Training, command_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_stops(training, number):
    """Asked to stop in a step, it ends that step and writes its state, and leaves nothing else behind."""
    children, said = training.children(), len(training.output)
    assert any("cluster.journal_sender" in command_of(child) for child in children)
    training.ask_to_stop(number)
    assert training.finish() == 128 + number, training.output.decode()
    output = training.output[said:].decode()
    assert "started anew" not in output, "the signal is not for the actors"
    (step,) = re.findall(r"stopped after step (\d+); give the same command again", output)
    assert (training.folder_of(int(step)) / "manifest.json").exists(), "the step was finished and its state written"
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "processes are left"
    assert [run.info.status for run in training.tracked()] == ["KILLED", "KILLED"]


@pytest.fixture(scope="module")
def uninterrupted(supervised, tmp_path_factory):
    training = Training(supervised, tmp_path_factory.mktemp("uninterrupted")).start()
    assert training.finish() == 0, training.output.decode()
    assert not list((training.run / "train" / "states").glob("*/*")), "a finished stage keeps no states"
    return training


def test_a_driver_that_is_stopped_and_killed_again_and_again_ends_with_the_same_weights(
    supervised, uninterrupted, tmp_path
):
    """SIGTERM and Ctrl-C in a step; SIGKILL inside the writing of a state, and in the step where an epoch ends."""
    training = Training(supervised, tmp_path).start()
    training.wait_for(lambda: b"0/8" in training.output or b"sampler" in training.output)
    training.wait_for(lambda: training.processes("LearnerRank.update"))
    assert_stops(training, signal.SIGTERM)
    training.start().wait_for(lambda: training.processes("RolloutEngine.generate"))
    assert_stops(training, signal.SIGINT)
    training.start().wait_for(lambda: training.writes_state(4))
    training.kill()
    begun = training.folder_of(4)
    assert begun.exists()
    assert not (begun / "manifest.json").exists(), "it was killed inside the writing"
    training.start().wait_for(lambda: training.before_new_epoch(4))
    training.wait_for(lambda: training.processes("RolloutEngine.generate"))
    training.kill()
    assert training.start().finish() == 0, training.output.decode()
    assert training.output.count(b"goes on after step") == 4, training.output.decode()
    assert_same_weights(training.weights, uninterrupted.weights)
    history, status = training.history()
    assert (history, status) == uninterrupted.history(), "no gap and no repetition"
    assert [step for step, _ in history] == list(range(1, STEPS + 1))


def test_killed_actors_of_every_kind_change_nothing(supervised, uninterrupted, tmp_path):
    """A rollout engine, a reward worker and the learner are killed in one run, which goes on unattended."""
    training = Training(supervised, tmp_path).start()
    for step, kind in ((1, "RolloutEngine"), (3, "RewardWorker"), (4, "LearnerRank"), (5, "LearnerRank")):
        training.wait_for(lambda kind=kind, step=step: training.reached(step) and training.processes(kind))
        os.kill(training.processes(kind)[0].pid, signal.SIGKILL)
    assert training.finish() == 0, training.output.decode()
    for message in (b"rollout engine 0 is started anew", b"reward worker 0 died", b"the learner is started anew"):
        assert message in training.output, training.output.decode()
    trained, _ = training.history("train/groups_trained")
    assert trained == uninterrupted.history("train/groups_trained")[0], "none was lost and none trained twice"
    for name, expected in uninterrupted.weights.items():
        # A new engine has another prefix cache, so the last digits of its log-probabilities may differ.
        torch.testing.assert_close(training.weights[name], expected, atol=1e-3, rtol=1e-2)
