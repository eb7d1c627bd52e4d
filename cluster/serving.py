"""The service as a Ray Serve application, and the command that runs it until it is stopped."""

# Annotations are evaluated here: Serve reads that of `application`.
import os
import queue
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import Field
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from actors.recommender import DirectRecommender, ReasoningRecommender, ReplicaPlan
from actors.rollout import environment
from actors.served_run import planned_versions
from cluster.pipeline import EVALUATED_STAGES
from cluster.progress import console
from cluster.section import Section
from cluster.serving_settings import ReplicaSettings, ServingSettings
from cluster.settings import Settings, load_settings
from item_index.input_error import InputError

APPLICATION = "gream"
LOOKUPS_AT_ONCE = 16  # of items, users and versions


class ServeArguments(Section):
    """The arguments of the application in a Serve config file."""

    run: str = Field(description="Run folder, on a file system that all nodes see.")
    overrides: tuple[str, ...] = Field((), description="Settings that replace the run's, as key.path=value.")


def served_settings(run_folder: str, overrides: Sequence[str]) -> Settings:
    """The settings of a run with its folder as it is named here."""
    return load_settings(Path(run_folder) / "settings.yaml", [*overrides, f"run_folder={run_folder}"])


def application(arguments: ServeArguments) -> serve.Application:
    """The application of a Serve config file: `import_path: cluster.serving:application`."""
    return application_of(served_settings(arguments.run, arguments.overrides))


def application_of(settings: Settings) -> serve.Application:
    """HTTP interface, direct mode and reasoning mode, each with replicas of its own."""
    serving, cluster = settings.serving, settings.cluster
    folder = settings.folder.resolve()
    checkpoint = folder / EVALUATED_STAGES[serving.checkpoint] / "checkpoint"
    api_keys(serving)  # known to be missing before anything starts; each replica reads them from its own environment
    plan = ReplicaPlan(
        str(folder), str(checkpoint), planned_versions(folder, checkpoint), serving.beam_width, serving.batch_users,
        serving.batch_wait_ms / 1000,
        settings.train.reasoning_budget, cluster.rollout_sequences, cluster.threads, cluster.dtype,
        cluster.kv_cache_mib,
    )  # fmt: skip
    variables = {"OMP_NUM_THREADS": str(cluster.threads)}
    direct = deployed(DirectRecommender, serving, serving.direct, variables, LOOKUPS_AT_ONCE).bind(plan)
    with_vllm = variables | environment(cluster.model_runner)
    reasoning = deployed(ReasoningRecommender, serving, serving.reasoning, with_vllm, LOOKUPS_AT_ONCE).bind(plan)
    interface: Any = serve.ingress()(RecommendationInterface)
    return deployed(interface, serving, serving.api, {}).bind(serving, direct, reasoning)


class RecommendationInterface:
    """The replicas that speak HTTP: they know no model and no catalogue, so one version of it serves all others."""

    def __init__(self, settings: ServingSettings, direct: Any, reasoning: Any) -> None:
        self.arguments = (settings, direct, reasoning, api_keys(settings))

    def __serve_build_asgi_app__(self) -> Any:
        from cluster.recommendation_api import build_api

        return build_api(*self.arguments)


def deployed(
    replica: Any, serving: ServingSettings, settings: ReplicaSettings, variables: dict[str, str], lookups: int = 0
) -> Any:
    """A deployment of some class, with room for lookups beside its ongoing requests.

    New replicas are ready before old ones end what they work on and go. Serve counts what it is handing to a replica
    among what waits, so its queue has room for all that may be under way too; the interface says when a mode is full.
    """
    ongoing = settings.ongoing_requests + lookups
    number: dict[str, Any] = {"num_replicas": settings.minimum}
    if settings.maximum is not None:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.minimum, max_replicas=settings.maximum,
                target_ongoing_requests=max(1, settings.ongoing_requests / 2),
            )
        }  # fmt: skip
    options: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
    return serve.deployment(
        replica, max_ongoing_requests=ongoing,
        max_queued_requests=ongoing * settings.most_replicas + settings.queued_requests,
        ray_actor_options={**options, "runtime_env": {"env_vars": variables}},
        graceful_shutdown_timeout_s=serving.drain_seconds, graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2, health_check_timeout_s=30, max_surge_percent=100,
        logging_config=LoggingConfig(enable_access_log=False),  # the proxy's is enough
        **number,
    )  # fmt: skip


def api_keys(serving: ServingSettings) -> list[bytes]:
    """The accepted keys out of the environment. Raises InputError where a variable is named and holds none."""
    if serving.key_variable is None:
        return []
    keys = [key.strip().encode() for key in os.environ.get(serving.key_variable, "").split(",") if key.strip()]
    if not keys:
        raise InputError(
            f"the environment variable {serving.key_variable} holds no key", field="serving.key_variable",
            remedy="Set it to the accepted keys, separated by commas.",
        )  # fmt: skip
    return keys


def serve_run(run_folder: str, overrides: Sequence[str], *, wait: bool) -> None:
    """Serve a run, or put it in the place of what the cluster serves.

    With `wait` until Ctrl-C or SIGTERM; SIGHUP puts what the run folder holds by then in the place of what is served.
    """
    settings = served_settings(run_folder, overrides)
    serving, cluster = settings.serving, settings.cluster
    deployment = application_of(settings)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if not wait and not address:
        raise InputError(
            "a Ray that starts here would end with this command", field="cluster.address",
            remedy="Name a cluster's address with --no-wait, or leave --no-wait away.",
        )  # fmt: skip
    local: Any = {} if address else {"include_dashboard": False}
    ray.init(address=address, log_to_driver=False, **local)
    serve.start(http_options=HTTPOptions(host=serving.host, port=serving.port))
    received: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if wait else ():
        signal.signal(number, lambda number, _frame: received.put(number))
    serve.run(deployment, name=APPLICATION, route_prefix="/")
    console.print(f"serve: http://{serving.host}:{serving.port}", highlight=False)
    if not wait:
        return
    while received.get() == signal.SIGHUP:
        try:
            serve.run(application_of(served_settings(run_folder, overrides)), name=APPLICATION, route_prefix="/")
            console.print("serve: what the run folder holds is served now", highlight=False)
        except (InputError, RuntimeError) as error:  # what was served before goes on
            console.print(f"serve: not put in place: {error}", style="red", highlight=False, markup=False)
    console.print("serve: no new requests; those under way are finished")
    serve.delete(APPLICATION)
    serve.shutdown()
    ray.shutdown()
