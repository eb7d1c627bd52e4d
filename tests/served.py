"""`gream serve` in a process of its own, asked over real HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import safetensors.torch
from train_runs import ROOT, command_of

KEYS = ("first-4f1c07", "second-9b2e55")
KEY = {"Authorization": f"Bearer {KEYS[1]}"}
PATIENCE = 400


class Service:
    """A run's supervised checkpoint, or the one that the overrides name, behind KEYS."""

    def __init__(self, run, *overrides, log=None):
        self.run, self.log = Path(run), log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [
                Path(sys.executable).with_name("gream"), "serve", "--run", str(run), "serving.checkpoint=sft",
                f"serving.port={self.port}", "serving.key_variable=TEST_KEYS", "serving.body_kib=16",
                "serving.body_seconds=2", "serving.timeout_seconds=120", *overrides,
            ],
            cwd=ROOT, start_new_session=True, stdout=log and log.open("wb"),
            env={**environment, "TEST_KEYS": ", ".join(KEYS)},
        )  # fmt: skip
        self.client = httpx.Client(base_url=self.url, headers=KEY, timeout=PATIENCE)
        self.wait_for(self.is_ready)

    def wait_for(self, condition):
        """Wait until it holds; the service must not end meanwhile. Returns what the condition gave."""
        deadline = time.monotonic() + PATIENCE
        while not (met := condition()):
            assert self.process.poll() is None, "the service has ended"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.5)
        return met

    def is_ready(self):
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def recommend(self, **body):
        return self.client.post("/v1/recommend", json=body)

    def stream(self, **body):
        """An open response with the events of a request."""
        return self.client.stream("POST", "/v1/recommend", json={**body, "stream": True})

    def replicas(self, name):
        return self.processes(f"ServeReplica:gream:{name}")

    def processes(self, name):
        """Those of Ray's processes below the service whose name holds this."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if name in command_of(child)]

    def logs(self):
        """The log files of Ray's session, those of all replicas among them."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            found = re.search(r"--session-dir=(\S+)", command_of(child))
            if found:
                return [file for file in Path(found[1], "logs").rglob("*") if file.is_file()]
        raise AssertionError("no process names Ray's session")

    def metric(self, name, **tags):
        """Sum of the service's metric over its processes, of the series with these tags."""
        lines = self.client.get("/metrics").text.splitlines()
        wanted = [f'{tag}="{value}"' for tag, value in tags.items()]
        values = [
            float(line.split()[-1])
            for line in lines
            if line.startswith(f"ray_gream_serving_{name}{{") and all(tag in line for tag in wanted)
        ]
        return sum(values)

    def output(self):
        """What `gream serve` has printed into its log."""
        return self.log.read_text()

    def stop(self):
        os.kill(self.process.pid, signal.SIGTERM)
        assert self.process.wait(timeout=PATIENCE) == 0


def events(lines):
    """(name, data) of server-sent events as they come."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@contextmanager
def load(client, clients=2, **body):
    """Requests of some clients like this one, one after the other, while the block runs; gives their answers."""
    answers, ended = [], threading.Event()

    def ask():
        with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=PATIENCE) as own:
            while not ended.is_set():
                answers.append(own.post("/v1/recommend", json=body))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            ended.set()
    for one in asking:
        one.result()


def lists_by_version(answers):
    """The different lists of items of each checkpoint's version."""
    lists = {}
    for answer in answers:
        body = answer.json()
        lists.setdefault(body["versions"]["checkpoint"], set()).add(tuple(item["item_id"] for item in body["items"]))
    return lists


def change_weights(checkpoint):
    """Put other weights, whose lists are others, in the place of a checkpoint's, in one step."""
    file = checkpoint / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    changed = {name: weight + 0.05 * weight.roll(1, 0) for name, weight in weights.items()}
    safetensors.torch.save_file(changed, f"{file}.new", metadata={"format": "pt"})
    os.replace(f"{file}.new", file)
