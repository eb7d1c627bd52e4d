"""MLflow tracking of one run: settings whole, metrics per step, tables and files."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.entities import Metric, Param, RunStatus
from mlflow.tracking import MlflowClient

from cluster.settings import Settings


def tracking_uri(settings: Settings) -> str:
    """The named URI, or SQLite in the run folder."""
    return settings.tracking.uri or f"sqlite:///{(settings.folder / 'mlflow.db').resolve()}"


class Tracker:
    """One MLflow run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log all values at once (a call each costs tens of milliseconds)."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id, metrics=[Metric(_metric_name(name), float(value), now, step) for name, value in values.items()]
        )

    def text(self, text: str, name: str) -> None:
        self.client.log_text(self.run_id, text, name)

    def file(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")  # MLflow does not allow @


@contextmanager
def tracked(settings: Settings, stage: str) -> Iterator[Tracker]:
    """A tracked run named after the stage; it ends FINISHED, FAILED on an exception, or KILLED on an interrupt."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    settings.folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri(settings))
    client = MlflowClient()
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(
            settings.tracking.experiment,
            artifact_location=None if settings.tracking.uri else (settings.folder / "artifacts").resolve().as_uri(),
        )
    )
    run = client.create_run(experiment_id, run_name=f"{settings.folder.name}/{stage}", tags={"gream.stage": stage})
    tracker = Tracker(client, run.info.run_id)
    tracker.text(settings.dump(), "settings.yaml")
    parameters = _flat(settings.model_dump(mode="json"))
    client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in parameters.items()])
    try:
        yield tracker
    except KeyboardInterrupt:
        client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))
        raise
    except BaseException:
        client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.FAILED))
        raise
    client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.FINISHED))


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
