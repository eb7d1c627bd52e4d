"""What the records of a journal become in MLflow."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.signature import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from cluster.journal import Store, file_stamps

BATCH_METRICS, BATCH_PARAMETERS = 1000, 100  # MLflow's own limits of one request
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
# What is wrong with the record; everything else is wrong with the store, and may come right.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")


class Refused(Exception):  # the record's fault, so it is not tried again
    """MLflow does not take a record, and would not later."""


class RunLost(Exception):
    """MLflow does not know a run that it gave an id to, or it was deleted there."""


class MlflowStore:
    """One tracking server or database. Calls raise Refused, RunLost, or what the connection raises."""

    def __init__(self, store: Store) -> None:
        self.store = store
        _make_database(store.uri)
        mlflow.set_tracking_uri(store.uri)
        self.client = MlflowClient(store.uri, store.uri)

    def open_run(self, key: str, record: dict[str, Any], parent: str | None, replaces: str | None) -> str:
        """The id of the run of a key, made where there is none, with the status RUNNING and the record's tags."""
        experiment = self._experiment()
        tags = {**record["tags"], "gream.key": key}
        if parent:
            tags["mlflow.parentRunId"] = parent
        if replaces:
            tags["gream.replaces"] = replaces
        found = self.client.search_runs([experiment], f"tags.`gream.key` = '{key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        elif parent and not self.has_run(parent):
            raise RunLost(parent)
        else:  # with its key at once, so that it is found where this process ends before it has noted the id
            run_id = self.client.create_run(
                experiment, start_time=record["time"], run_name=record["name"], tags={"gream.key": key}
            ).info.run_id
        self.client.update_run(run_id, status="RUNNING")
        self.tags(run_id, tags)
        return run_id

    def _experiment(self) -> str:
        experiment = self.client.get_experiment_by_name(self.store.experiment)
        if experiment is not None:
            return experiment.experiment_id
        return self.client.create_experiment(self.store.experiment, artifact_location=self.store.artifact_location)

    def has_run(self, run_id: str) -> bool:
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    @contextmanager
    def _sending(self, run_id: str) -> Iterator[None]:
        """Tell apart what is wrong: the run is not there, the record is bad, or (as it was raised) the connection."""
        try:
            yield
        except MlflowException as error:
            if error.error_code not in (*REFUSALS, "RESOURCE_DOES_NOT_EXIST"):
                raise
            if not self.has_run(run_id):
                raise RunLost(run_id) from error
            if error.error_code not in REFUSALS:
                raise
            raise Refused(str(error)) from error

    def metrics(self, run_id: str, records: list[dict[str, Any]]) -> None:
        """Log records of kind `metrics` of one run in as few requests as MLflow allows."""
        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        with self._sending(run_id):
            for start in range(0, len(metrics), BATCH_METRICS):
                self.client.log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])

    def parameters(self, run_id: str, values: dict[str, str]) -> None:
        parameters = [Param(name, value) for name, value in values.items()]
        with self._sending(run_id):
            for start in range(0, len(parameters), BATCH_PARAMETERS):
                self.client.log_batch(run_id, params=parameters[start : start + BATCH_PARAMETERS])

    def tags(self, run_id: str, values: dict[str, str]) -> None:
        with self._sending(run_id):
            self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in values.items()])

    def end(self, run_id: str, status: str, time: int) -> None:
        with self._sending(run_id):
            self.client.set_terminated(run_id, status, time)

    def file(self, run_id: str, file: Path, name: str, *, is_table: bool) -> None:
        """Log a file under a name with `/`; a table also gets the tag by which MLflow finds tables."""
        if not file.is_file():
            raise Refused(f"{file} has gone")
        parent = str(PurePosixPath(name).parent)
        with self._sending(run_id):
            self.client.log_artifact(run_id, str(file), None if parent == "." else parent)
            if is_table:
                tables = json.loads(self.client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
                if (entry := {"path": name, "type": "table"}) not in tables:
                    self.client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*tables, entry]))

    def figure(self, run_id: str, figure: Any, name: str) -> None:
        with self._sending(run_id):
            self.client.log_figure(run_id, figure, f"figures/{name}.png")

    def model(self, run_id: str, record: dict[str, Any]) -> None:
        """Register a checkpoint as a version of the model: its files with an MLmodel, and the aliases of the record.

        Weights above the store's `weights_mib` stay where they are; the version's tag `gream.checkpoint` says where.
        """
        folder = Path(record["folder"])
        if not folder.is_dir() or record["files"] != file_stamps(folder):
            raise Refused(f"{folder} has changed since it was to be registered")
        mib = sum(size for size, _ in record["files"].values()) / 2**20
        place = f"models/{record['name']}"
        with self._sending(run_id), tempfile.TemporaryDirectory() as temporary:
            weights = "copied" if mib <= self.store.weights_mib else "left in place"
            for name in record["files"]:
                if weights == "copied" or not name.endswith(WEIGHT_SUFFIXES):
                    self.client.log_artifact(run_id, str(folder / name), place)
            description = Model(
                artifact_path=place, run_id=run_id, signature=_signature(folder),
                flavors={"gream": {"checkpoint": folder.as_uri(), "weights": weights, "format": "hugging face"}},
            )  # fmt: skip
            description.save(str(Path(temporary) / "MLmodel"))
            self.client.log_artifact(run_id, str(Path(temporary) / "MLmodel"), place)
            source = f"{self.client.get_run(run_id).info.artifact_uri}/{place}"
            version = self._version(run_id, source, {"gream.checkpoint": folder.as_uri(), "gream.weights": weights})
            for alias in record["aliases"]:
                self.client.set_registered_model_alias(self.store.model, alias, version)

    def _version(self, run_id: str, source: str, tags: dict[str, str]) -> str:
        """The version of the model that a run made from a source; one that is there already is that one."""
        name = self.store.model
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.run_id == run_id and version.source == source:
                return version.version
        return self.client.create_model_version(name, source, run_id, tags, await_creation_for=0).version


def _make_database(uri: str) -> None:
    """Make an SQLite file that is not there yet, whole or not at all.

    MLflow makes its tables by a hundred migrations; a file whose maker was killed among them is of no use any more.
    """
    place = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or place.exists():
        return
    unfinished = place.with_name(f"{place.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{unfinished}", f"sqlite:///{unfinished}").search_experiments()
    os.replace(unfinished, place)


def _signature(checkpoint: Path) -> ModelSignature:
    """Token ids in, logits over the checkpoint's vocabulary out."""
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    tokens: list[Any] = [TensorSpec(np.dtype("int64"), (-1, -1), name) for name in ("input_ids", "attention_mask")]
    return ModelSignature(Schema(tokens), Schema([TensorSpec(np.dtype("float32"), (-1, -1, vocabulary), "logits")]))
