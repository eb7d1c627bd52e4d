"""A tracking server that can be killed, and a `gream train` that is tracked by it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from benchmarks.tracking_report import STEP_SECONDS, Points, Step, steps_of
from cluster.journal import JOURNAL_FILE, read_records
from cluster.tracking import TRACKING_FOLDER

SERVER_SECONDS, END_SECONDS = 300.0, 120.0
POLL_SECONDS = 0.25
# Evaluation jobs, which nobody asks this server for, would be eight more processes on the cores of the run.
SERVER_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

Value = TypeVar("Value")


class Server:
    """A tracking server with a SQLite store on loopback. Started with an empty folder it is a wiped one."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path) -> None:
        """Returns when it answers."""
        folder.mkdir(exist_ok=True)
        log = folder / "log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                 "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
                 "--artifacts-destination", str(folder / "files")],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **SERVER_ENVIRONMENT},
            )  # fmt: skip
        deadline = time.monotonic() + SERVER_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)

    def answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def kill(self) -> None:
        """By SIGKILL, its workers too: the process group is its own."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(END_SECONDS)
            self.process = None


class TrackedRun:
    """`gream train` in a process of its own, and what its journal and MLflow have of it."""

    def __init__(self, overrides: list[str], folder: Path, uri: str, seconds: float) -> None:
        self.journal, self.log = folder / TRACKING_FOLDER / JOURNAL_FILE, folder / "train.log"
        self.client, self.deadline = MlflowClient(uri, uri), time.monotonic() + seconds
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("gream")), "train", *overrides, f"run_folder={folder}",
                 f"tracking.uri={uri}"],
                stdout=output, stderr=subprocess.STDOUT,
                env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            )  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        return [record for record, _, _ in read_records(self.journal)]

    def steps(self) -> list[Step]:
        return steps_of(self.records())

    def tracked(self, *, without: str | None = None) -> Run | None:
        """The stage's run in MLflow, where it is there and is not the one of that id."""
        runs = [run for run in self.runs() if run.data.tags.get("gream.stage") == "train"]
        return runs[0] if runs and runs[0].info.run_id != without else None

    def runs(self) -> list[Run]:
        """All runs in MLflow, the latest first."""
        experiment = self.client.get_experiment_by_name("gream")
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    def points(self) -> Points:
        """All metrics in MLflow; two runs of one key add up, so that a run that was made twice is seen."""
        journal = self.records()[0]["id"]
        points: dict[tuple[str, str], Counter[tuple[int, str]]] = defaultdict(Counter)
        for run in self.runs():
            key = run.data.tags["gream.key"].removeprefix(f"{journal}/")
            for name in run.data.metrics:
                history = self.client.get_metric_history(run.info.run_id, name)
                points[key, name].update((point.step, str(point.value)) for point in history)
        return points

    def wait_for(self, condition: Callable[[], Value | None], what: str) -> Value:
        """Until the condition holds; RuntimeError with the run's output where that does not happen in time."""
        while True:
            with suppress(MlflowException):  # the server has just begun to answer
                if value := condition():
                    return value
            if self.process.poll() is not None:
                how = "failed" if self.process.returncode else "is over (it needs more --steps)"
                raise RuntimeError(f"the run {how} before {what}:\n{self.log.read_text()}")
            if time.monotonic() > self.deadline:
                raise RuntimeError(f"not within --limit: {what}\n{self.log.read_text()}")
            time.sleep(POLL_SECONDS)

    def wait_for_steps(self, count: int) -> None:
        """Until there are so many more of them."""
        target = len(self.steps()) + count
        self.wait_for(lambda: len(self.steps()) >= target, f"{count} more steps")

    def caught_up(self, *, without: str | None = None) -> tuple[Run, float]:
        """The stage's run when MLflow has all steps that the journal has now, and the seconds that took."""
        asked, numbers = time.monotonic(), {step.number for step in self.steps()}

        def all_there() -> Run | None:
            run = self.tracked(without=without)
            history = self.client.get_metric_history(run.info.run_id, STEP_SECONDS) if run else []
            return run if numbers <= {point.step for point in history} else None

        return self.wait_for(all_there, f"MLflow had steps 1 .. {max(numbers)}"), time.monotonic() - asked

    def finish(self) -> None:
        """Wait until it ends by itself, which has to go well."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(self.deadline - time.monotonic(), 1))
        if self.process.returncode is None:
            raise RuntimeError(f"not within --limit: the run's end\n{self.log.read_text()}")
        if self.process.returncode != 0:
            raise RuntimeError(f"the run failed:\n{self.log.read_text()}")

    def stop(self) -> None:
        """End it where it still runs; asked first, so that it ends its Ray processes."""
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
