"""The journal of a run folder: all that is to be tracked, on disk as JSON lines before it is anywhere else.

The driver appends and waits for no network; `cluster/journal_sender.py` follows the file in a process of its own. A
record names the run it belongs to by a key, `NAME/FINGERPRINT/ATTEMPT`, because ids are what a server gives, later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

JOURNAL_FILE, FILES_FOLDER, SETTINGS_FILE, LOG_FILE = "journal.jsonl", "files", "settings.yaml", "sender.log"

# What is sent at once, and what takes longer and must not hold it up.
VALUES, ARTIFACTS = "values", "artifacts"
KINDS = {VALUES: ("run", "metrics", "parameters", "tags", "end"), ARTIFACTS: ("artifact", "model", "end")}


@dataclass(frozen=True)
class Store:
    """Where to send a journal.

    Attributes:
        uri: MLflow's tracking URI.
        experiment: its name.
        artifact_location: where a new experiment keeps its files; None leaves it to the store.
        model: name of the registered model.
        weights_mib: checkpoints up to that size are copied into a version of it.
    """

    uri: str
    experiment: str
    artifact_location: str | None
    model: str
    weights_mib: float

    @property
    def sent_file(self) -> str:
        """Name of the file that says how much of the journal this store has."""
        return f"sent-{hashlib.sha256(f'{self.uri} {self.experiment}'.encode()).hexdigest()[:12]}.json"


def this_session() -> str:
    """Host, process id and its start: tells a process from a later one of the same id."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_gone(session: str) -> bool:
    """Whether the process of a session has ended; of one on another host that is not known, so False."""
    host, process_id, started = session.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(process_id)).create_time() - float(started)) > 1
    except psutil.NoSuchProcess:
        return True


class Journal:
    """Appends to the journal of a run folder. A line is one write, so it outlives the process once the call returns.

    Args:
        folder: `tracking/` of the run folder; it is made, and a line that a full disk has cut off is taken away.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / JOURNAL_FILE
        (folder / FILES_FOLDER).mkdir(parents=True, exist_ok=True)
        self.session = this_session()
        self._lock = threading.Lock()
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            size = self.file.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._descriptor, size)
        if not size:
            self.append("journal", id=uuid.uuid4().hex)

    def append(self, kind: str, **values: Any) -> None:
        """Add one record, stamped with the time in milliseconds and this process."""
        record = {"kind": kind, "time": int(time.time() * 1000), "session": self.session, **values}
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]

    def keep(self, name: str, content: str | Path) -> str:
        """Put a text, or a copy of a file, beside the journal; returns its path relative to the folder."""
        place = Path(FILES_FOLDER) / f"{time.time_ns()}" / name
        (self.folder / place).parent.mkdir(parents=True)
        if isinstance(content, Path):
            shutil.copyfile(content, self.folder / place)
        else:
            (self.folder / place).write_text(content)
        return str(place)

    def close(self) -> None:
        os.close(self._descriptor)


def read_records(file: Path, offset: int = 0, limit: int | None = None) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Whole lines from an offset on: (record, its offset, the offset behind it); at most `limit` of them."""
    with file.open("rb") as lines:
        lines.seek(offset)
        while limit is None or limit > 0:
            line = lines.readline()
            if not line.endswith(b"\n"):
                return
            yield json.loads(line), offset, offset + len(line)
            offset += len(line)
            limit = None if limit is None else limit - 1


def unsent_records(folder: Path, store: Store) -> int:
    """How many records the store does not have yet."""
    sent_file = folder / store.sent_file
    sent = json.loads(sent_file.read_text()) if sent_file.is_file() else {"offsets": {VALUES: 0, ARTIFACTS: 0}}
    return sum(
        record["kind"] in KINDS[part] and (part == VALUES or record["kind"] != "end")
        for part, offset in sent["offsets"].items()
        for record, _, _ in read_records(folder / JOURNAL_FILE, offset)
    )


@dataclass
class RunState:
    """What the journal says of a run: the session that had it last, and how it ended there (None: it did not)."""

    session: str
    status: str | None


class RunStates:
    """The runs of a journal, by key, taken in record by record."""

    def __init__(self) -> None:
        self.runs: dict[str, RunState] = {}

    def take(self, record: dict[str, Any]) -> bool:
        """Take in a record; False for an end that does not count, because another process has gone on with the run."""
        if record["kind"] == "run":
            self.runs[record["run"]] = RunState(record["session"], None)
        elif record["kind"] == "end":
            state = self.runs[record["run"]]
            if state.session != record["of"]:
                return False
            state.status = record["status"]
        return True

    @classmethod
    def of(cls, file: Path) -> RunStates:
        states = cls()
        for record, _, _ in read_records(file):
            states.take(record)
        return states

    def attempt(self, name: str) -> tuple[str, bool]:
        """The key of the run to write to, and whether it is one to go on with: the last attempt, unless it finished."""
        attempts = [int(key.rpartition("/")[2]) for key in self.runs if key.rpartition("/")[0] == name]
        last = max(attempts, default=0)
        if last and self.runs[f"{name}/{last}"].status != "FINISHED":
            return f"{name}/{last}", True
        return f"{name}/{last + 1}", False

    def unended(self, session: str | None = None) -> Iterator[tuple[str, str]]:
        """(key, session) of runs without an end: of one session, or of all whose processes have gone."""
        for key, state in self.runs.items():
            if state.status is None and (state.session == session if session else is_gone(state.session)):
                yield key, state.session


def file_stamps(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in nanoseconds of the files right in a folder."""
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.iterdir()) if file.is_file()
    }


def close_ended(journal: Journal, session: str | None = None) -> None:
    """Write the end, FAILED, of runs whose process has gone without a word."""
    for key, owner in list(RunStates.of(journal.file).unended(session)):
        journal.append("end", run=key, status="FAILED", of=owner)
