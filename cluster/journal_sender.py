"""Sends a run folder's journal to MLflow, in a process of its own: `python -m cluster.journal_sender`.

Two places in the journal are kept on disk for each store: up to where runs, metrics and status were sent, and up to where
files, figures and models were. The second never holds up the first. What was sent and not yet noted when a process ended
is sent again; MLflow ignores a metric that it has, and the rest replaces itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.journal import JOURNAL_FILE, Journal, RunStates, close_ended, read_records

log = logging.getLogger("sender")
BATCH_RECORDS, BATCH_METRICS, BATCH_PARAMETERS = 500, 1000, 100
LONGEST_PAUSE = 15.0
# What is wrong with a record itself; everything else is wrong with the store, and may come right.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
VALUES, ARTIFACTS = "values", "artifacts"
KINDS = {VALUES: {"run", "metrics", "parameters", "tags", "end"}, ARTIFACTS: {"artifact", "model", "end"}}


@dataclass(frozen=True)
class Store:
    """Where to: MLflow's tracking URI, the experiment, where a new experiment keeps its files (None: where the store
    likes), the registered model, and up to how many MiB weights are copied into a version of it."""

    uri: str
    experiment: str
    artifact_location: str | None
    model: str
    weights_mib: float


class RunLost(Exception):
    """The store does not have a run that it had."""


@dataclass
class SentRun:
    """A run in the store. Records before `sent` were with it when the journal was gone through once more."""

    id: str | None = None
    replaces: str | None = None
    sent: dict[str, int] = field(default_factory=lambda: {VALUES: 0, ARTIFACTS: 0})


class JournalSender:
    """Follows one journal into one store; only one at a time holds the folder (`locked`)."""

    def __init__(self, folder: Path, store: Store) -> None:
        from mlflow.utils.logging_utils import suppress_logs  # noqa: F401  # mlflow is slow to import; keep it here

        self.folder, self.store, self.file = folder, store, folder / JOURNAL_FILE
        self._client: MlflowClient | None = None
        self.sent_file = sent_file(folder, store)
        self.refused = 0
        self.offsets = {VALUES: 0, ARTIFACTS: 0}
        self.runs: dict[str, SentRun] = {}
        self.states = {VALUES: RunStates(), ARTIFACTS: RunStates()}
