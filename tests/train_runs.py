"""A small run whose supervised stage is done, and its train stage: in a process that can be ended, or elsewhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import safetensors.torch
from mlflow import MlflowClient
from small_tables import write_tables

from cluster.pipeline import run_stages
from cluster.settings import load_settings

ROOT = Path(__file__).parents[1]
STEPS, PROMPTS = 8, 6
PATIENCE = 400


def make_supervised(folder):
    """A run folder whose supervised stage is done, and the settings."""
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


def command_of(process):
    """The command line of a process, which Ray's workers make the name of what they do; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class TrainRun:
    """A copy of the run folder, and what the train stage leaves there."""

    def __init__(self, supervised, folder, *more):
        source, overrides = supervised
        self.run = folder / "run"
        shutil.copytree(source, self.run)
        self.overrides = [*overrides, *more, f"run_folder={self.run}"]

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

    @property
    def weights(self):
        return safetensors.torch.load_file(self.run / "train" / "checkpoint" / "model.safetensors")

    def history(self, name="train/reward"):
        """(step, value) of a metric in MLflow, and how the stage's run ended."""
        stage, _command = self.tracked()
        values = self.mlflow.get_metric_history(stage.info.run_id, name)
        return sorted((value.step, value.value) for value in values), stage.info.status

    def tracked(self):
        """The run of the stage in MLflow, and that of the command around it."""
        (experiment,) = [e for e in self.mlflow.search_experiments() if e.name == "gream"]
        runs = self.mlflow.search_runs([experiment.experiment_id], "tags.`gream.stage` = 'train'")
        assert len(runs) == 1, "a resumed run goes on in the same MLflow run"
        return runs[0], self.mlflow.get_run(runs[0].data.tags["mlflow.parentRunId"])

    @property
    def mlflow(self):
        return MlflowClient(f"sqlite:///{self.run / 'mlflow.db'}")


class Training(TrainRun):
    """`gream train` there, in a process of its own that can be looked at and ended."""

    def __init__(self, supervised, folder, *more):
        super().__init__(supervised, folder, *more)
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

    def ask_to_stop(self, number):
        """As a terminal does it on Ctrl-C, SIGINT to the whole group, or by a signal to `gream` alone."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes(self, name):
        """Actors of a class that run now."""
        return [child for child in self.children() if command_of(child).startswith(f"ray::{name}")]
