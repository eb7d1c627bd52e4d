"""Ray for one run: the connection, one placement group for learner and rollout engine, and calls with a deadline."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.settings import ClusterSettings

POLL_SECONDS = 0.2


class DeadlineExceeded(TimeoutError):
    """An actor did not answer in time."""


@contextmanager
def ray_session(settings: ClusterSettings) -> Iterator[None]:
    """Connect to the named cluster, or start Ray on this machine and stop it at the end."""
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        cpus = max(settings.learner_cpus + settings.rollout_engines * settings.rollout_cpus, os.cpu_count() or 1)
        ray.init(num_cpus=int(cpus), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(bundles: Sequence[dict[str, float]]) -> None:
    """Raise RuntimeError that says what is asked for and what there is, where the cluster can never hold it."""
    total = {key: sum(bundle.get(key, 0) for bundle in bundles) for key in bundles[0]}
    have = ray.cluster_resources()
    if any(have.get(key, 0) < amount for key, amount in total.items()):
        raise RuntimeError(
            f"the cluster cannot hold the bundles {bundles}: it has "
            f"{ {key: have.get(key, 0) for key in total} }; lower cluster.learner_cpus and "
            "cluster.rollout_cpus, or add nodes"
        )


@contextmanager
def engines_placed(settings: ClusterSettings, *, engines: int = 1, learner_ranks: int = 0) -> Iterator[PlacementGroup]:
    """A placement group with the first bundles for engines and the next ones for the learner's ranks.

    Raises RuntimeError that says what was asked and what the cluster has when it is not ready by the deadline.
    """
    places = [(settings.rollout_cpus, settings.gpus_per_engine * settings.tensor_parallel)] * engines
    places += [(settings.learner_cpus, settings.gpus_per_engine)] * learner_ranks
    bundles = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus, gpus in places]
    require_resources(bundles)
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(settings.start_seconds):
            raise RuntimeError(
                f"no place for the bundles {bundles} within {settings.start_seconds:.0f} s; free now: "
                f"{ray.available_resources()}"
            )
        yield group
    finally:
        remove_placement_group(group)


def in_bundle(group: PlacementGroup, bundle: int, settings: ClusterSettings, environment: dict[str, str]) -> dict:
    """Options of an actor that lives in a bundle of the group."""
    return {
        "num_cpus": group.bundle_specs[bundle]["CPU"],
        "num_gpus": group.bundle_specs[bundle].get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        "runtime_env": {"env_vars": {**environment, "OMP_NUM_THREADS": str(settings.threads)}},
    }


def run_watched(name: str, job: Callable[[], object], progressed: Callable[[], bool], seconds: float) -> None:
    """Run a job of Ray that knows no deadline of its own, as long as it makes progress; raises what it raises.

    Args:
        name: of the job.
        job: blocks until the work is done.
        progressed: asked again and again whether there is anything new, and once more at the end.
        seconds: without progress after which DeadlineExceeded is raised: a job may take days, but not stand still.
    """
    failure: list[BaseException] = []

    def execute() -> None:
        try:
            job()
        except BaseException as error:
            failure.append(error)

    # A daemon does not keep the process alive when our deadline runs out.
    thread = threading.Thread(target=execute, daemon=True, name=f"{name} job")
    thread.start()
    grown_at = time.monotonic()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if progressed():
            grown_at = time.monotonic()
        if time.monotonic() - grown_at > seconds:
            raise DeadlineExceeded(
                f"the {name} job has made no progress for {seconds:.0f} s; look at the workers' logs in Ray's session "
                "folder, or raise cluster.call_seconds"
            )
    progressed()
    if failure:
        raise failure[0]


def _late(what: str, seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{what} did not arrive within {seconds:.0f} s; look at the actor's log in Ray's session folder, or raise "
        "cluster.call_seconds"
    )


def await_ready(reference: ray.ObjectRef, what: str, seconds: float) -> None:
    """Wait for a result without fetching it; raises DeadlineExceeded that names what was waited for."""
    ready, _ = ray.wait([reference], timeout=seconds, fetch_local=False)
    if not ready:
        raise _late(what, seconds)


def await_stream(stream: ray.ObjectRefGenerator, what: str, seconds: float) -> list[ray.ObjectRef]:
    """References of all that a streaming call gives, without fetching it; raises DeadlineExceeded where the next one is
    late."""
    references: list[ray.ObjectRef] = []
    while True:
        ready, _ = ray.wait([stream], timeout=seconds, fetch_local=False)
        if not ready:
            raise _late(f"{what}, part {len(references)},", seconds)
        try:
            references.append(next(stream))
        except StopIteration:
            return references


def await_result(reference: ray.ObjectRef, what: str, seconds: float) -> Any:
    """Wait for a result and fetch it; raises DeadlineExceeded like `await_ready`."""
    await_ready(reference, what, seconds)
    return ray.get(reference, timeout=seconds)
