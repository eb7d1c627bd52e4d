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
    """One MLflow run. What an interrupted stage logged before is not logged again when it does its steps again."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.logged = {
            (name, value.step)
            for name in client.get_run(run_id).data.metrics
            for value in client.get_metric_history(run_id, name)
        }

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log all values at once (a call each costs tens of milliseconds)."""
        now = int(time.time() * 1000)
        named = {_metric_name(name): float(value) for name, value in values.items()}
        fresh = [Metric(name, value, now, step) for name, value in named.items() if (name, step) not in self.logged]
        self.logged.update((name, step) for name in named)
        if fresh:
            self.client.log_batch(self.run_id, metrics=fresh)

    def text(self, text: str, name: str) -> None:
        self.client.log_text(self.run_id, text, name)

    def file(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")  # MLflow does not allow @


@contextmanager
def tracked(settings: Settings, stage: str, *, fingerprint: str) -> Iterator[Tracker]:
    """A tracked run named after the stage; it ends FINISHED, FAILED on an exception, or KILLED on an interrupt.

    Args:
        fingerprint: of everything that the stage depends on, hexadecimal: its latest run of the same one is continued
            where it did not finish. Empty for a new run in any case.
    """
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
    tags = {
        "gream.stage": stage, "gream.fingerprint": fingerprint, "gream.run_folder": str(settings.folder.resolve()),
    }  # fmt: skip
    earlier = client.search_runs(
        [experiment_id], f"tags.`gream.fingerprint` = '{fingerprint}'", order_by=["attributes.start_time DESC"]
    )
    same = [run for run in earlier if tags.items() <= run.data.tags.items()][:1]
    if fingerprint and same and same[0].info.status != RunStatus.to_string(RunStatus.FINISHED):
        run = same[0]
        client.update_run(run.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
    else:
        run = client.create_run(experiment_id, run_name=f"{settings.folder.name}/{stage}", tags=tags)
        parameters = _flat(settings.model_dump(mode="json"))
        client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in parameters.items()])
    tracker = Tracker(client, run.info.run_id)
    tracker.text(settings.dump(), "settings.yaml")
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
