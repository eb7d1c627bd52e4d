"""Tracking of a `gream` command and its stages.

What is tracked goes into a journal on disk, and a process beside the driver sends it to MLflow, so that no server can
stop or slow training. Nothing here imports MLflow.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from cluster.journal import (
    LOG_FILE,
    SETTINGS_FILE,
    Journal,
    RunStates,
    Store,
    close_ended,
    file_stamps,
    read_records,
    unsent_records,
)
from cluster.progress import console
from cluster.settings import Settings
from cluster.stopping import signals_blocked

TRACKING_FOLDER = "tracking"
# A server that does not answer is tried again by the sender, with pauses of its own; MLflow would try for minutes.
SENDER_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def tracking_uri(settings: Settings) -> str:
    """The named URI, or SQLite in the run folder."""
    return settings.tracking.uri or f"sqlite:///{(settings.folder / 'mlflow.db').resolve()}"


def store_of(settings: Settings) -> Store:
    """Where the settings want the journal sent."""
    tracking, folder = settings.tracking, settings.folder.resolve()
    return Store(
        uri=tracking_uri(settings), experiment=tracking.experiment,
        artifact_location=None if tracking.uri else (folder / "artifacts").as_uri(),
        model=tracking.model or f"gream-{folder.name}", weights_mib=tracking.weights_mib,
    )  # fmt: skip


class Tracker:
    """One MLflow run. A call appends to the journal and returns; what was logged before an interruption is not logged
    again when a stage does its steps again."""

    def __init__(self, journal: Journal, key: str, logged: Mapping[str, set[int]]) -> None:
        self.key, self._journal, self._logged, self._seconds = key, journal, defaultdict(set, logged), 0.0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log the values of a step; a metric counts once for each step."""
        with self._timed():
            named = {_metric_name(name): float(value) for name, value in values.items()}
            fresh = {name: value for name, value in named.items() if step not in self._logged[name]}
            if fresh:
                self._journal.append("metrics", run=self.key, step=step, values=fresh)
            for name in fresh:
                self._logged[name].add(step)

    def text(self, text: str, name: str) -> None:
        """Log a text as a file of that name, which may have folders in it."""
        self._artifact(name, text)

    def file(self, path: Path) -> None:
        """Log a copy of a small file, as it is now."""
        self._artifact(path.name, path)

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Log a table: columns of equal length, values that JSON knows; `name` ends with .json."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self._artifact(name, json.dumps({"columns": list(columns), "data": rows}), table=True)

    def tags(self, values: Mapping[str, str]) -> None:
        with self._timed():
            self._journal.append("tags", run=self.key, values=dict(values))

    def model(self, folder: Path, name: str, aliases: Sequence[str]) -> None:
        """Register a checkpoint as a version of the model, with aliases; it must stay as it is until it is sent."""
        with self._timed():
            folder = folder.resolve()
            self._journal.append(
                "model", run=self.key, folder=str(folder), name=name, aliases=list(aliases), files=file_stamps(folder)
            )

    def next_step(self, name: str) -> int:
        """The step after the last one of a metric, from 0 on."""
        return max(self._logged[name], default=-1) + 1

    def take_seconds(self) -> float:
        """Seconds spent in calls of this tracker since they were last taken."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _artifact(self, name: str, content: str | Path, *, table: bool = False) -> None:
        with self._timed():
            path = self._journal.keep(name, content)
            self._journal.append("artifact", run=self.key, path=path, name=name, table=table)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")  # MLflow does not allow @


class CommandTracking:
    """The runs of one `gream` command: its own, and one for each stage inside it."""

    def __init__(self, settings: Settings, journal: Journal, tags: Mapping[str, str]) -> None:
        self.settings, self._journal = settings, journal
        self._states = RunStates.of(journal.file)
        self._tags = {"gream.run_folder": str(settings.folder.resolve()), "mlflow.user": getpass.getuser(), **tags}
        self._command: str | None = None

    @contextmanager
    def run(self, title: str, name: str, fingerprint: str, tags: Mapping[str, str]) -> Iterator[Tracker]:
        """A run that ends FINISHED, FAILED on an exception, or KILLED on an interrupt. The first one is the parent of
        those inside it. Where the last run of the same name and fingerprint did not finish, it is gone on with.

        Args:
            title: the run's name in MLflow.
            name: of the command or stage.
            fingerprint: of everything that the result depends on.
        """
        key, goes_on = self._states.attempt(f"{name}/{fingerprint[:16]}")
        logged = logged_steps(self._journal.file, key) if goes_on else {}
        tags = {**self._tags, **tags, "gream.fingerprint": fingerprint}
        self._append("run", run=key, name=title, parent=self._command, tags=tags)
        if not goes_on:  # of a run that goes on, what it depends on is the same, and MLflow does not change the rest
            self._append("parameters", run=key, values=self.settings.flat())
        parent, self._command = self._command, self._command or key
        try:
            yield Tracker(self._journal, key, logged)
        except KeyboardInterrupt:
            self._end(key, "KILLED")
            raise
        except BaseException:
            self._end(key, "FAILED")
            raise
        else:
            self._end(key, "FINISHED")
        finally:
            self._command = parent

    def stage(self, name: str, fingerprint: str) -> Any:
        """The run of a stage, as a context manager that gives its Tracker."""
        return self.run(f"{self.settings.folder.name}/{name}", name, fingerprint, {"gream.stage": name})

    def _end(self, key: str, status: str) -> None:
        self._append("end", run=key, status=status, of=self._journal.session)

    def _append(self, kind: str, **values: Any) -> None:
        self._journal.append(kind, **values)
        self._states.take({"kind": kind, "session": self._journal.session, **values})


def logged_steps(file: Path, key: str) -> dict[str, set[int]]:
    """The steps of each metric that the journal has for a run."""
    logged: dict[str, set[int]] = defaultdict(set)
    for record, _, _ in read_records(file):
        if record["kind"] == "metrics" and record["run"] == key:
            for name in record["values"]:
                logged[name].add(record["step"])
    return logged


@contextmanager
def tracked_command(settings: Settings, command: str, fingerprint: str) -> Iterator[CommandTracking]:
    """Track a `gream` command: starts the process that sends, gives it `tracking.flush_seconds` at the end.

    Args:
        fingerprint: of the code; runs of a command go on where code and settings are the same.
    """
    folder = settings.folder / TRACKING_FOLDER
    journal = Journal(folder)
    close_ended(journal)
    (folder / SETTINGS_FILE).write_text(settings.dump())
    tracking = CommandTracking(settings, journal, {"gream.code": fingerprint, **_commit()})
    try:
        with (
            _sender(settings, journal),
            tracking.run(
                f"{settings.folder.name}: gream {command}", f"gream {command}", _settings_hash(settings, fingerprint),
                {"gream.command": command},
            ) as tracker,
            _system_metrics(tracker, settings.tracking.system_seconds),
        ):  # fmt: skip
            tracker.text(settings.dump(), "settings.yaml")
            yield tracking
    finally:
        journal.close()


@contextmanager
def _sender(settings: Settings, journal: Journal) -> Iterator[None]:
    """The process that sends. It outlives what asks the driver to stop, as it has the rest to send then: a terminal's
    Ctrl-C goes to the whole process group, and `ray job stop` sends SIGTERM to every process of the job."""
    folder, flush_seconds = journal.folder.resolve(), settings.tracking.flush_seconds
    order = {
        "folder": str(folder), "store": asdict(store_of(settings)), "driver": os.getpid(), "session": journal.session,
        "flush_seconds": flush_seconds,
    }  # fmt: skip
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ["PYTHONPATH"]]) if os.environ.get("PYTHONPATH") else root
    with (folder / LOG_FILE).open("ab") as log, signals_blocked():
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.journal_sender"], stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True, env={**SENDER_ENVIRONMENT, **os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        yield
    finally:
        try:
            with suppress(BrokenPipeError):  # it has ended before; what is left is said below
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(flush_seconds)
        finally:
            process.kill()  # at any moment: what it has not noted as sent is sent again
            process.wait()
        left = unsent_records(folder, store_of(settings))
        if left:
            console.print(
                f"tracking: {left} records are not in MLflow yet (why: {folder / LOG_FILE}). The next gream command in "
                f"this run folder sends them, or now: gream track {settings.folder}", style="yellow", highlight=False,
            )  # fmt: skip


@contextmanager
def _system_metrics(tracker: Tracker, seconds: float) -> Iterator[None]:
    """Log load and memory of the driver's machine every so many seconds, under MLflow's own names; 0 does not."""
    done = threading.Event()

    def sample() -> None:
        process, step = psutil.Process(), tracker.next_step("system/cpu_utilization_percentage")
        psutil.cpu_percent()
        while not done.wait(seconds):
            memory = psutil.virtual_memory()
            tracker.metrics(
                {
                    "system/cpu_utilization_percentage": psutil.cpu_percent(),
                    "system/system_memory_usage_megabytes": memory.used / 1e6,
                    "system/system_memory_usage_percentage": memory.percent,
                    "system/driver_memory_megabytes": process.memory_info().rss / 1e6,
                },
                step,
            )
            step += 1

    thread = threading.Thread(target=sample, name="system metrics", daemon=True)
    if seconds:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if seconds:
            thread.join()


def send_left_overs(settings: Settings) -> int:
    """Send what is left of the run folder's journal, for `tracking.flush_seconds` at most; returns what remains."""
    os.environ.update({name: value for name, value in SENDER_ENVIRONMENT.items() if name not in os.environ})
    from cluster.journal_sender import send_all

    return send_all(settings.folder / TRACKING_FOLDER, store_of(settings), settings.tracking.flush_seconds)


def _commit() -> dict[str, str]:
    """The commit of the code, where it lies in a git repository and there is git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return {}
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}


def _settings_hash(settings: Settings, code: str) -> str:
    values = settings.model_dump(mode="json", exclude={"tracking"})
    return hashlib.sha256(json.dumps([code, values], sort_keys=True).encode()).hexdigest()
