"""Rollout engines beyond those that a run needs: each joins when the cluster has a place for it, and may leave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.bundles import engine_bundle
from cluster.placement import Placement
from cluster.progress import console
from cluster.settings import ClusterSettings


@dataclass(frozen=True)
class _Starting:
    actor: Any
    started: ray.ObjectRef
    deadline: float


class AdditionalEngines:
    """`cluster.additional_engines` engines that a run takes when it can have them; nothing here waits.

    Each has a placement group of its own, pending until the cluster has room, which is also what Ray's autoscaler
    brings nodes for. An engine that is lost leaves: its place is given back and asked for anew. One that does not
    start `cluster.maximum_restarts` times in a row is not tried again.

    Args:
        start: makes the actor of an engine with that number in that place.
    """

    def __init__(self, cluster: ClusterSettings, start: Callable[[int, Placement], Any]) -> None:
        self.cluster, self._start = cluster, start
        self._places: dict[int, Placement] = {}
        self._starting: dict[int, _Starting] = {}
        self._failures: Counter[int] = Counter()
        self._joined: set[int] = set()
        for number in range(cluster.rollout_engines, cluster.rollout_engines + cluster.additional_engines):
            self._ask(number)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def arrived(self) -> list[tuple[int, Any]]:
        """Number and actor of the engines that have started since the last call, and begin those that have a place."""
        arrived = []
        for number, place in list(self._places.items()):
            if number in self._joined:
                continue
            starting = self._starting.get(number)
            if starting is None:
                if place.is_there:
                    actor = self._start(number, place)
                    deadline = time.monotonic() + self.cluster.start_seconds
                    self._starting[number] = _Starting(actor, actor.sampler_in_use.remote(), deadline)
                continue
            ready, _ = ray.wait([starting.started], timeout=0)
            if ready:
                try:
                    sampler = ray.get(starting.started, timeout=self.cluster.call_seconds)
                except ray.exceptions.RayError as error:
                    self._failed(number, str(error))
                    continue
                console.print(f"rollout engine {number} has joined: sampler {sampler}", highlight=False)
                del self._starting[number]
                self._joined.add(number)
                self._failures[number] = 0
                arrived.append((number, starting.actor))
            elif time.monotonic() > starting.deadline:
                self._failed(number, f"it did not start within {self.cluster.start_seconds:.0f} s")
        return arrived

    def leave(self, number: int, cause: str) -> None:
        """Give the place of a lost engine back, and ask for another one."""
        console.print(f"rollout engine {number} has left: {cause}", style="yellow", highlight=False, markup=False)
        self._joined.discard(number)
        self._give_back(number)
        self._ask(number)

    def close(self) -> None:
        """Give all places back, which ends the actors in them."""
        for number in list(self._places):
            self._give_back(number)

    def _ask(self, number: int) -> None:
        bundle = engine_bundle(self.cluster, number)
        self._places[number] = Placement(placement_group([bundle.resources]), [bundle], self.cluster.threads)

    def _give_back(self, number: int) -> None:
        if (starting := self._starting.pop(number, None)) is not None:
            ray.kill(starting.actor, no_restart=True)
        remove_placement_group(self._places.pop(number).group)

    def _failed(self, number: int, cause: str) -> None:
        self._failures[number] += 1
        self._give_back(number)
        if self._failures[number] > self.cluster.maximum_restarts:
            times = self._failures.pop(number)
            console.print(
                f"rollout engine {number} stays away, it did not start {times} times in a row: {cause}",
                style="yellow", highlight=False, markup=False,
            )  # fmt: skip
            return
        self._ask(number)
