"""Ray for one run: the connection, a placement group for the actors with resources, calls with a deadline."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bundles import Bundle, bundles_of, what_is_missing
from cluster.progress import console
from cluster.settings import ClusterSettings
from cluster.stopping import stopping_by_signals

POLL_SECONDS = 0.2


class DeadlineExceeded(TimeoutError):
    """An actor did not answer in time."""


class WorkLost(RuntimeError):
    """What a step needs was lost with a process or a node; the run can go back to its latest state."""


def lost(error: BaseException) -> bool:
    """Whether an error of Ray says that a process, a node or an object in its memory is gone."""
    cause = getattr(error, "cause", None) or error
    return isinstance(
        cause, ray.exceptions.RayActorError | ray.exceptions.ObjectLostError | ray.exceptions.NodeDiedError
    )


def lost_what(error: BaseException) -> str:
    """The first line of such an error that says something: Ray's begin with the address of an actor or an object."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"


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
        engines, rewards = settings.rollout_engines, settings.reward_workers
        wanted = settings.learner_cpus + engines * settings.rollout_cpus + rewards * settings.reward_cpus
        cpus = max(math.ceil(wanted), os.cpu_count() or 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with stopping_by_signals():  # Ray has put a handler of its own in the place of ours
            yield
    finally:
        ray.shutdown()


def require_places(bundles: Sequence[Bundle], cluster: ClusterSettings) -> None:
    """Raise RuntimeError that says what is asked for, what there is and what to change, where the cluster cannot hold
    the bundles even when it is empty; not where `cluster.wait_for_nodes_seconds` lets an autoscaler change that."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    missing = what_is_missing(bundles, nodes)
    if missing and not cluster.wait_for_nodes_seconds:
        raise RuntimeError(f"the cluster has no place for this run: {missing}")
    if missing:
        console.print(f"waiting for nodes, {cluster.wait_for_nodes_seconds:.0f} s at most: {missing}", highlight=False)


@dataclass(frozen=True)
class Placement:
    """Bundles that a placement group holds for this run."""

    group: PlacementGroup
    bundles: list[Bundle]
    threads: int

    @property
    def is_there(self) -> bool:
        """Whether the cluster holds all bundles now."""
        return self.group.wait(0)

    def options(self, kind: str, number: int, environment: dict[str, str]) -> dict[str, Any]:
        """Options of the actor that is this process of the bundles."""
        bundle, process = next(
            (place, process)
            for place, bundle in enumerate(self.bundles)
            for process in bundle.processes
            if (process.kind, process.number) == (kind, number)
        )
        return {
            "num_cpus": process.cpus,
            "num_gpus": process.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
            "runtime_env": {"env_vars": {**environment, "OMP_NUM_THREADS": str(self.threads)}},
        }


@contextmanager
def placed(
    cluster: ClusterSettings, *, engines: int = 1, learner_ranks: int = 0, reward_workers: int = 0
) -> Iterator[Placement]:
    """Places for rollout engines, learner ranks and reward workers, on as few nodes as they fit on.

    Raises RuntimeError that says what was asked and what the cluster has, at once where it never can hold it, and after
    `cluster.start_seconds` where others hold the places. A pending group is what Ray's autoscaler brings nodes for.
    """
    bundles = bundles_of(cluster, engines=engines, learner_ranks=learner_ranks, reward_workers=reward_workers)
    require_places(bundles, cluster)
    seconds = cluster.wait_for_nodes_seconds + cluster.start_seconds
    group = placement_group([bundle.resources for bundle in bundles], strategy="PACK")
    try:
        if not group.wait(seconds):
            raise RuntimeError(
                f"no place for {', '.join(map(str, bundles))} within {seconds:.0f} s (cluster.wait_for_nodes_seconds "
                f"and cluster.start_seconds): others hold it, or nodes have not come; free now: "
                f"{ray.available_resources()}"
            )
        yield Placement(group, bundles, cluster.threads)
    finally:
        remove_placement_group(group)


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
