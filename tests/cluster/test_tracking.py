"""Tracking against real MLflow: SQLite, and a server that is killed, brought back and wiped under a running driver."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from cluster.journal import read_records, unsent_records
from cluster.settings import load_settings
from cluster.tracking import send_left_overs, store_of, tracked_command, tracking_uri

DEADLINE = 240
# A driver that logs as many steps as it is told to on standard input, and says what it did.
DRIVER = """
import os, signal, sys, psutil
from cluster.settings import load_settings
from cluster.tracking import tracked_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background may ignore it, and all below
with tracked_command(load_settings(None, sys.argv[1:]), "train", "code") as command:
    with command.stage("train", "fingerprint") as tracker:
        first = 0
        for line in sys.stdin:
            first, last = map(int, line.split())
            for step in range(first, last):
                tracker.metrics({"train/reward": step / 4, "train/loss": -step}, step)
            sockets = [c for c in psutil.Process().net_connections() if c.status != psutil.CONN_NONE]
            print(last, len(sockets), "mlflow" in sys.modules, flush=True)
"""


class Driver:
    def __init__(self, settings):
        overrides = [
            f"run_folder={settings.folder}", f"tracking.uri={json.dumps(settings.tracking.uri)}",
            f"tracking.flush_seconds={settings.tracking.flush_seconds}", "tracking.system_seconds=0",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *overrides], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def log(self, first, last):
        """Have it log the steps; returns after the last one."""
        self.process.stdin.write(f"{first} {last}\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().split()
        assert said == [str(last), "0", "False"], "the driver has no connection and does not know MLflow"

    def end(self):
        output, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0, output
        return output


@pytest.fixture
def settings(tmp_path):
    """Settings of a run folder, with overrides; nothing is waited for at a command's end unless they say so."""
    return lambda *more: load_settings(
        None, [f"run_folder={tmp_path / 'run'}", "tracking.flush_seconds=0", "tracking.system_seconds=0", *more]
    )


def patient(settings):
    return load_settings(
        None, [f"run_folder={settings.folder}", f"tracking.uri={json.dumps(settings.tracking.uri)}",
               f"tracking.weights_mib={settings.tracking.weights_mib}", f"tracking.flush_seconds={DEADLINE}"],
    )  # fmt: skip


def send(settings):
    assert send_left_overs(patient(settings)) == 0


def runs_of(settings):
    """All MLflow runs, the earliest first."""
    client = MlflowClient(tracking_uri(settings))
    experiment = client.get_experiment_by_name("gream")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]) if experiment else []
    return client, found


def history(client, run, name="train/reward"):
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.5)
    return value


def stage_run(settings, *, status=None, steps=None):
    """The newest run of the train stage once it has this status and so many steps, else None."""
    try:
        client, runs = runs_of(settings)
    except mlflow.exceptions.MlflowException:
        return None  # the server is starting
    stages = [run for run in runs if run.data.tags.get("gream.stage") == "train"]
    if not stages or (status and stages[-1].info.status != status):
        return None
    if steps is not None and len(history(client, stages[-1])) < steps:
        return None
    return stages[-1]


def test_a_command_and_its_stages_are_nested_runs_that_say_how_they_ended(settings):
    settings = settings()
    with tracked_command(settings, "run", "code") as command:
        with command.stage("index", "of index") as tracker:
            tracker.metrics({"index/items": 24, "recall@10": 0.5, "broken": float("nan")})
            tracker.tags({"gream.index": "version"})
        with pytest.raises(ValueError, match="bad"), command.stage("sft", "of sft"):
            raise ValueError("bad")
    with (
        pytest.raises(KeyboardInterrupt),
        tracked_command(settings, "train", "code") as command,
        command.stage("train", "of train"),
    ):
        raise KeyboardInterrupt
    send(settings)
    client, runs = runs_of(settings)
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert statuses == {
        "run: gream run": "FINISHED", "run/index": "FINISHED", "run/sft": "FAILED", "run: gream train": "KILLED",
        "run/train": "KILLED",
    }  # fmt: skip
    by_name = {run.info.run_name: run for run in runs}
    for parent, child in (("gream run", "index"), ("gream run", "sft"), ("gream train", "train")):
        assert by_name[f"run/{child}"].data.tags["mlflow.parentRunId"] == by_name[f"run: {parent}"].info.run_id
    index = by_name["run/index"].data
    assert index.metrics["index/items"] == 24
    assert index.metrics["recall_at_10"] == 0.5
    assert np.isnan(index.metrics["broken"])
    assert index.params["train.responses"] == str(settings.train.responses)
    assert index.tags["gream.index"] == "version"
    assert index.tags["gream.code"] == "code"
    files = [file.path for file in client.list_artifacts(by_name["run: gream run"].info.run_id)]
    assert files == ["settings.yaml"]


def test_what_was_sent_already_is_not_there_twice_when_it_is_sent_again(settings, tmp_path):
    """As after a crash between sending and taking note of it."""
    settings = settings("tracking.weights_mib=1")
    small, large = checkpoint(tmp_path / "small", 1000), checkpoint(tmp_path / "large", 2 * 2**20)
    with tracked_command(settings, "train", "code") as command, command.stage("train", "f") as tracker:
        for step in range(1, 1500):
            tracker.metrics({"train/reward": step}, step)
        tracker.metrics({"train/reward": 77}, 3)  # a step that is done again
        tracker.metrics({"no : such name!": 1})
        tracker.metrics({f"index/code_usage/level_{level}": 5 for level in (1, 2)})
        tracker.table({"item": ["Tale", "Saga"], "reward": [0.5, float("1")]}, "samples/step-1.json")
        tracker.model(small, "srpo", ["srpo"])
        tracker.model(large, "best", ["best"])
    for _ in range(2):
        send(settings)
        client, runs = runs_of(settings)
        assert len(runs) == 2
        run = runs[1]
        assert history(client, run) == [(step, step) for step in range(1, 1500)]
        assert Counter(run.data.metrics.keys())["train/reward"] == 1
        figures = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
        assert figures == {"figures/reward.png", "figures/code_usage.png"}
        mlflow.set_tracking_uri(tracking_uri(settings))  # load_table asks there
        table = client.load_table(run.info.experiment_id, "samples/step-1.json", run_ids=[run.info.run_id])
        assert table.to_dict("list") == {"item": ["Tale", "Saga"], "reward": [0.5, 1.0]}
        versions = client.search_model_versions("name = 'gream-run'")
        assert len(versions) == 2
        for alias, folder, weights in (("srpo", small, True), ("best", large, False)):
            version = client.get_model_version_by_alias("gream-run", alias)
            assert version.run_id == run.info.run_id
            assert version.tags["gream.checkpoint"] == folder.as_uri()
            files = Path(client.download_artifacts(run.info.run_id, f"models/{alias}"))
            assert (files / "model.safetensors").exists() == weights
            signature = Model.load(f"models:/gream-run@{alias}").signature
            assert [column.name for column in signature.inputs] == ["input_ids", "attention_mask"]
            assert signature.outputs.inputs[0].shape == (-1, -1, 97)
        for note in (settings.folder / "tracking").glob("sent-*.json"):
            note.unlink()
    refused = (settings.folder / "tracking" / "refused.jsonl").read_text().splitlines()
    assert all("no : such name!" in line for line in refused)
    assert len(refused) == 2, "once for each time that all was sent"


def checkpoint(folder, size):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 97}))
    (folder / "model.safetensors").write_bytes(bytes(size))
    return folder


def test_a_driver_that_is_killed_leaves_a_failed_run_and_goes_on_with_it(settings):
    settings = settings("tracking.flush_seconds=200")
    driver = Driver(settings)
    driver.log(0, 50)
    driver.process.kill()
    killed = wait_for(lambda: stage_run(settings, status="FAILED", steps=50))
    driver = Driver(settings)
    driver.log(30, 80)  # the steps since its last state are done again
    (sender,) = psutil.Process(driver.process.pid).children()
    sender.send_signal(signal.SIGTERM)  # `ray job stop` sends its signal to every process of the job
    driver.process.send_signal(signal.SIGINT)
    driver.process.wait(DEADLINE)
    assert not sender.is_running()
    assert stage_run(settings).info.status == "KILLED"
    driver = Driver(settings)
    driver.log(75, 100)
    driver.end()
    client, runs = runs_of(settings)
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]
    finished = stage_run(settings)
    assert finished.info.run_id == killed.info.run_id
    assert history(client, finished) == [(step, step / 4) for step in range(100)]
    assert unsent_records(settings.folder / "tracking", store_of(settings)) == 0


class Server:
    """A real tracking server on loopback; wiped where it starts with another folder."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.process = f"http://127.0.0.1:{self.port}", None

    def start(self, folder):
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
             "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
             "--artifacts-destination", str(folder / "files")],
            stdout=(folder / "log").open("ab"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        wait_for(self.answers)

    def answers(self):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
            return answer.status == 200
        return False

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers too; the group is its own
            self.process.wait(DEADLINE)


@pytest.mark.timeout(1200)
def test_a_server_that_is_down_and_then_wiped_loses_nothing_and_holds_up_nothing(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of this test's own questions
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    server = Server()
    settings = settings(f"tracking.uri={server.uri}", "tracking.flush_seconds=200")
    driver = Driver(settings)
    try:
        driver.log(0, 50)  # the server is not there yet
        server.start(tmp_path / "first")
        first = wait_for(lambda: stage_run(settings, status="RUNNING", steps=50))
        server.kill()
        driver.log(50, 100)
        server.start(tmp_path / "first")
        again = wait_for(lambda: stage_run(settings, steps=100))
        assert again.info.run_id == first.info.run_id
        server.kill()
        driver.log(100, 120)
        server.start(tmp_path / "wiped")
        driver.log(120, 150)
        driver.end()
        client, runs = runs_of(settings)
        assert len(runs) == 2
        replayed = stage_run(settings, status="FINISHED")
        assert replayed.data.tags["gream.replaces"] == first.info.run_id
        assert history(client, replayed) == [(step, step / 4) for step in range(150)]
        (parent,) = (run for run in runs if "gream.command" in run.data.tags)
        assert replayed.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert replayed.data.params["train.responses"] == str(settings.train.responses)
    finally:
        driver.process.kill()
        server.kill()


def test_what_a_dead_server_did_not_get_stays_in_the_journal_and_is_named(settings, capsys):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening
        settings = settings(f"tracking.uri=http://127.0.0.1:{nobody.getsockname()[1]}")
        with tracked_command(settings, "train", "code") as command, command.stage("train", "f") as tracker:
            tracker.metrics({"train/reward": 1}, 1)
            assert tracker.take_seconds() > 0
            assert tracker.take_seconds() == 0
    left = sum(record["kind"] != "journal" for record, _, _ in read_records(settings.folder / "tracking/journal.jsonl"))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{left} records are not in MLflow yet" in printed
    assert f"gream track {settings.folder}" in printed
