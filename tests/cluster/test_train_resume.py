"""`gream train` is interrupted, really, again and again, and ends as if nothing had happened: bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient
from small_tables import write_tables

from cluster.pipeline import run_stages
from cluster.settings import load_settings

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
STEPS, PROMPTS = 8, 6
PATIENCE = 400


@pytest.fixture(scope="module")
def supervised(tmp_path_factory, ray_cluster):
    """A run folder whose supervised stage is done, and the settings."""
    folder = tmp_path_factory.mktemp("supervised")
    overrides = [
        *write_tables(folder / "data"), "corpus.reasoning_rows=40", "sft.passes=1", "sft.batch_rows=16",
        "sft.learning_rate=1.0e-3", "cluster.threads=1", f"train.steps={STEPS}", f"train.prompts_per_step={PROMPTS}",
        "train.mini_batch_prompts=3", "train.responses=4", "train.learning_rate=1.0e-3", "train.warm_up_steps=2",
        "train.rewards=[{reward: 'reward_functions:partly_alike'}]", "train.probe_prompts=4",
        "train.reasoning_budget=40", "train.checkpoint_steps=1", "corpus.rl_holdout=0.04", "cluster.kv_cache_mib=32",
        "cluster.rollout_sequences=32", "train.dump_rollouts=true",
    ]  # fmt: skip
    run_stages(load_settings(None, [*overrides, f"run_folder={folder / 'run'}"]), ["index", "corpus", "sft"])
    return folder / "run", overrides


class Training:
    """`gream train` in a copy of the run folder, in a process of its own that can be looked at and ended."""

    def __init__(self, supervised, folder, *more):
        source, overrides = supervised
        self.run = folder / "run"
        shutil.copytree(source, self.run)
        self.overrides = [*overrides, *more, f"run_folder={self.run}"]
        self.process, self.output = None, b""

    def start(self):
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("gream"), "train", *self.overrides], cwd=ROOT, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)
        return self

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.output += self.process.stdout.read() or b""
            assert self.process.poll() is None, f"the stage ended by itself: {self.output.decode()}"
            assert time.monotonic() < deadline, f"no progress: {self.output.decode()}"
            time.sleep(0.002)

    def finish(self):
        """Wait for the end; the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            self.output += self.process.stdout.read() or b""
            assert time.monotonic() < deadline, f"no end: {self.output.decode()}"
            time.sleep(0.05)
        self.output += self.process.stdout.read() or b""
        return self.process.returncode

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)

    def folder_of(self, step):
        (states,) = (self.run / "train" / "states").iterdir()
        return states / f"step-{step:06d}"

    def reached(self, step):
        """Whether the update of a step has begun."""
        return (self.run / "rollouts" / f"step-{step:06d}.parquet").exists()

    def has_state(self, step):
        """Whether the state of a step, or of a later one, is whole."""
        whole = (self.run / "train").glob("states/*/step-*/manifest.json")
        return any(int(file.parent.name.removeprefix("step-")) >= step for file in whole)

    def writes_state(self, step):
        """Whether the state of a step has been begun, and has no manifest."""
        return any(
            not (folder / "manifest.json").exists() for folder in (self.run / "train").glob(f"states/*/step-{step:06d}")
        )

    def before_new_epoch(self, step):
        """Whether the newest state, of that step or a later one, is that before a step in which a pass over the prompts
        ends and the next begins."""
        states = sorted((self.run / "train").glob("states/*/step-*/manifest.json"))
        try:
            loop = json.loads((states[-1].parent / "loop.json").read_text()) if states else {"step": -1}
        except FileNotFoundError:
            return False  # it was the oldest one until now
        if loop["step"] < step:
            return False
        sampler = loop["loop"]["scheduler"]["sampler"].values()
        return any(0 < len(mode["pass"]) - mode["drawn"] < PROMPTS // 2 for mode in sampler)

    def processes(self, name):
        """Actors of a class that run now."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.name().startswith(f"ray::{name}")]

    @property
    def weights(self):
        return safetensors.torch.load_file(self.run / "train" / "checkpoint" / "model.safetensors")

    def history(self, name="train/reward"):
        """(step, value) of a metric in all MLflow runs of the stage."""
        client = MlflowClient(f"sqlite:///{self.run / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "gream"]
        runs = client.search_runs([experiment.experiment_id], "tags.`gream.stage` = 'train'")
        assert len(runs) == 1, "a resumed run goes on in the same MLflow run"
        values = client.get_metric_history(runs[0].info.run_id, name)
        return sorted((value.step, value.value) for value in values), runs[0].info.status


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(supervised, tmp_path_factory):
    training = Training(supervised, tmp_path_factory.mktemp("uninterrupted")).start()
    assert training.finish() == 0, training.output.decode()
    assert not list((training.run / "train" / "states").glob("*/*")), "a finished stage keeps no states"
    return training


def test_a_driver_that_is_stopped_and_killed_again_and_again_ends_with_the_same_weights(
    supervised, uninterrupted, tmp_path
):
    """SIGTERM in a step; SIGKILL in a step, inside the writing of a state, and where an epoch ends."""
    training = Training(supervised, tmp_path).start()
    training.wait_for(lambda: b"0/8" in training.output or b"sampler" in training.output)
    training.wait_for(lambda: training.processes("LearnerRank.update"))
    children = psutil.Process(training.process.pid).children(recursive=True)
    training.process.send_signal(signal.SIGTERM)
    assert training.finish() == 128 + signal.SIGTERM, training.output.decode()
    assert b"give the same command again" in training.output, training.output.decode()
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "processes are left"
    assert training.history()[1] == "KILLED"
    assert (training.folder_of(1) / "manifest.json").exists(), "the step was finished and its state written"

    training.start().wait_for(lambda: training.has_state(2))
    training.wait_for(lambda: training.processes("RolloutEngine.generate"))
    training.kill()
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
