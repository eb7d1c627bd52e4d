"""Sends a run folder's journal to MLflow, in a process of its own: `python -m cluster.journal_sender`.

Two places in the journal are kept on disk for each store: up to where runs, metrics and status were sent, and up to
where files, figures and models were, so that the second never holds up the first. What was sent and not yet noted when
the process ended is sent again: MLflow ignores a metric that it has, and everything else replaces itself.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.journal import (
    ARTIFACTS,
    JOURNAL_FILE,
    KINDS,
    VALUES,
    Journal,
    RunStates,
    Store,
    close_ended,
    read_records,
    unsent_records,
)
from cluster.mlflow_store import MlflowStore, Refused, RunLost
from cluster.run_figures import run_figures

log = logging.getLogger("sender")
BATCH_RECORDS = 500
POLL_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
REFUSED_FILE, LOCK_FILE = "refused.jsonl", "sender.lock"


@dataclass
class SentRun:
    """A run in the store. What lies before `sent` in the journal was with it when that is gone through once more."""

    id: str | None = None
    replaces: str | None = None
    sent: dict[str, int] = field(default_factory=lambda: {VALUES: 0, ARTIFACTS: 0})


class JournalSender:
    """Sends one journal to one store. The folder must be locked: two senders would make every run twice."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.file, self.sent_file = folder, folder / JOURNAL_FILE, folder / store.sent_file
        self.store = store
        self.target: MlflowStore | None = None
        self._journal_id = next(read_records(self.file))[0]["id"]
        self._load()

    def _load(self) -> None:
        """Take up what is on disk; after a failure as after a start, so there is one way to go on."""
        sent = json.loads(self.sent_file.read_text()) if self.sent_file.is_file() else {}
        self.offsets: dict[str, int] = sent.get("offsets", {VALUES: 0, ARTIFACTS: 0})
        self.runs = {key: SentRun(**run) for key, run in sent.get("runs", {}).items()}
        self._rebuild_states()

    def _rebuild_states(self) -> None:
        self._states = {part: RunStates() for part in self.offsets}
        for record, start, _ in read_records(self.file):
            for part, states in self._states.items():
                if start < self.offsets[part]:
                    states.take(record)
            if start >= max(self.offsets.values()):
                break

    def _save(self) -> None:
        content = {"offsets": self.offsets, "runs": {key: asdict(run) for key, run in self.runs.items()}}
        temporary = self.sent_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.sent_file)

    def send(self) -> bool:
        """Send the next records; False when there are none. Raises what the connection raises; call again later."""
        if self.target is None:
            self.target = MlflowStore(self.store)
        try:
            return self._send_values(self.target) or self._send_artifact(self.target)
        except RunLost as lost:
            log.warning("the store has lost run %s; what it lacks is sent once more", lost)
            self._begin_again(self.target)
            return True
        except Exception:
            self._load()
            raise

    def _send_values(self, target: MlflowStore) -> bool:
        metrics: dict[str, list[dict[str, Any]]] = defaultdict(list)
        reached = self.offsets[VALUES]
        for record, start, reached in read_records(self.file, self.offsets[VALUES], BATCH_RECORDS):  # noqa: B007
            counts = self._states[VALUES].take(record)
            if record["kind"] not in KINDS[VALUES] or not counts or self._has(record, start, VALUES):
                continue
            if record["kind"] == "metrics":
                metrics[record["run"]].append(record)
                continue
            self._send_metrics(target, metrics)
            self._send_value(target, record)
        self._send_metrics(target, metrics)
        changed, self.offsets[VALUES] = reached > self.offsets[VALUES], reached
        if changed:
            self._save()
        return changed

    def _has(self, record: dict[str, Any], start: int, part: str) -> bool:
        run = self.runs.get(record["run"])
        return run is not None and start < run.sent[part]

    def _send_metrics(self, target: MlflowStore, metrics: dict[str, list[dict[str, Any]]]) -> None:
        for key, records in metrics.items():
            try:
                target.metrics(self._id(key), records)
            except Refused:  # which of them?
                for record in records:
                    self._taking_refusals(record, partial(target.metrics, self._id(key), [record]))
        metrics.clear()

    def _send_value(self, target: MlflowStore, record: dict[str, Any]) -> None:
        key, kind = record["run"], record["kind"]
        if kind == "run":
            run = self.runs.setdefault(key, SentRun())
            parent = self._id(record["parent"]) if record["parent"] else None
            run.id = target.open_run(f"{self._journal_id}/{key}", record, parent, run.replaces)
        elif kind == "parameters":
            self._taking_refusals(record, partial(target.parameters, self._id(key), record["values"]))
        elif kind == "tags":
            self._taking_refusals(record, partial(target.tags, self._id(key), record["values"]))
        else:
            target.end(self._id(key), record["status"], record["time"])

    def _send_artifact(self, target: MlflowStore) -> bool:
        for record, start, end in read_records(self.file, self.offsets[ARTIFACTS]):
            if start >= self.offsets[VALUES]:
                break
            counts = self._states[ARTIFACTS].take(record)
            if record["kind"] in KINDS[ARTIFACTS] and counts and not self._has(record, start, ARTIFACTS):
                self._taking_refusals(record, partial(self._artifact, target, record))
                self.offsets[ARTIFACTS] = end
                self._save()
                return True
            self.offsets[ARTIFACTS] = end
        return False

    def _artifact(self, target: MlflowStore, record: dict[str, Any]) -> None:
        run_id = self._id(record["run"])
        if record["kind"] == "artifact":
            target.file(run_id, self.folder / record["path"], record["name"], is_table=record["table"])
        elif record["kind"] == "model":
            target.model(run_id, record)
        else:
            for name, figure in run_figures(self._history(record["run"])).items():
                target.figure(run_id, figure, name)

    def _history(self, key: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every metric of a run."""
        history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for record, _, _ in read_records(self.file):
            if record["kind"] == "metrics" and record["run"] == key:
                for name, value in record["values"].items():
                    history[name].append((record["step"], value))
        return history

    def _id(self, key: str) -> str:
        run_id = self.runs[key].id
        if run_id is None:
            raise RuntimeError(f"{self.file}: a record of run {key} stands before the run's own")
        return run_id

    def _taking_refusals(self, record: dict[str, Any], call: Callable[[], None]) -> None:
        """Where MLflow does not take a record, keep it with the reason and go on with the next."""
        try:
            call()
        except Refused as refused:
            log.error("refused: %s", refused)
            with (self.folder / REFUSED_FILE).open("a") as file:
                file.write(json.dumps({"error": str(refused), "record": record}) + "\n")

    def _begin_again(self, target: MlflowStore) -> None:
        """Go through the journal from its beginning, for the runs that the store does not have any more."""
        self._load()
        for key, run in self.runs.items():
            if run.id is not None and target.has_run(run.id):
                run.sent = {part: max(run.sent[part], self.offsets[part]) for part in run.sent}
            else:
                self.runs[key] = SentRun(replaces=run.id or run.replaces)
        self.offsets = {part: 0 for part in self.offsets}
        self._rebuild_states()
        self._save()


def locked(folder: Path) -> int | None:
    """A descriptor that holds the folder for this process, or None while another one has it."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def send_all(folder: Path, store: Store, seconds: float) -> int:
    """Send what is left for so many seconds at most, and log why it could not be; returns how many records remain."""
    deadline = time.monotonic() + seconds
    descriptor, sender = None, None
    while time.monotonic() < deadline:
        descriptor = descriptor or locked(folder)
        try:
            if descriptor is not None:
                sender = sender or JournalSender(folder, store)
                if not sender.send():
                    break
                continue
            log.warning("another process is sending this journal")
        except Exception as error:
            log.warning("not sent: %s", error)
        time.sleep(1)
    if descriptor is not None:
        os.close(descriptor)
    return unsent_records(folder, store)


def follow(folder: Path, store: Store, driver: int, session: str, flush_seconds: float) -> None:
    """Send while the driver runs, which has the other end of standard input; then what is left, for `flush_seconds`."""
    sender, pause, gone = None, POLL_SECONDS, False
    while True:
        if not gone and (select.select([0], [], [], 0)[0] or os.getppid() != driver):
            gone = True
            # Whatever this process is in then, it is ended; the journal and the places in it stay whole.
            signal.setitimer(signal.ITIMER_REAL, max(flush_seconds, 0.001))
            journal = Journal(folder)
            close_ended(journal, session)
            journal.close()
        try:
            if sender is None and locked(folder) is not None:
                sender = JournalSender(folder, store)
            sent = sender is not None and sender.send()
            pause = POLL_SECONDS
        except Exception as error:  # whatever the connection raises, or a proxy, or a database: all of it may pass
            log.warning("not sent, again in %.0f s: %s", pause, error)
            sent = False
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        else:
            if gone and sender is not None and not sent:
                return
        if not sent:
            if gone:
                time.sleep(min(pause, 2))
            else:
                select.select([0], [], [], pause)


def main() -> None:
    """Read what to do as one line of JSON from standard input (a URI may hold a password), then follow the journal."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    os.nice(10)  # training comes first
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            return
        line += part
    order = json.loads(line)
    follow(Path(order["folder"]), Store(**order["store"]), order["driver"], order["session"], order["flush_seconds"])


if __name__ == "__main__":
    main()
