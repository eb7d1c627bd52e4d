"""The reward workers of a stage, and batches of rollouts spread over them; a lost worker costs one group at most."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from actors.reward import RewardActor, RewardFailure, ScoredResponses
from cluster.bundles import REWARD
from cluster.placement import DeadlineExceeded, Placement, WorkLost, await_result, lost, lost_what
from cluster.progress import console
from cluster.settings import Settings
from learner.rollouts import RolloutBatch
from rewards.composition import COLLABORATIVE, load_reward_term


@dataclass(frozen=True)
class _Slice:
    """What one worker scores in one call: numbers of batches, and groups of each."""

    parts: list[tuple[int, np.ndarray]]
    tries: int = 0

    @property
    def size(self) -> int:
        """Groups in all."""
        return sum(len(groups) for _, groups in self.parts)


@dataclass(eq=False)
class _Worker:
    number: int
    actor: Any
    failures: int = 0

    @property
    def name(self) -> str:
        return f"{REWARD} {self.number}"


class RewardPool:
    """`cluster.reward_workers` workers that score by the terms of `train.rewards`.

    A user's reward that raises, hangs in Python or gives no finite number is dealt with inside the worker. Where the
    worker itself does not answer in time (native code that hangs, a stopped process) or dies, it is killed and started
    anew, and the groups that it had are tried once more, each by itself, so that the one at fault alone is given up.
    After `cluster.maximum_restarts` losses in a row RuntimeError names the worker and the last cause.
    """

    def __init__(
        self, placement: Placement, settings: Settings, index: str, model: str, *, constrained: bool = True
    ) -> None:
        """`constrained` is whether the rollouts are sampled under the constraint."""
        train, self.cluster, self.placement = settings.train, settings.cluster, placement
        self.arguments = (index, model)
        self.options: dict[str, Any] = {
            "minimum_think_tokens": train.minimum_think_tokens, "seconds_per_response": train.reward_seconds,
            "terms": [term.model_dump() for term in train.rewards], "constrained": constrained,
        }  # fmt: skip
        terms = [
            load_reward_term(**term) for term in self.options["terms"]
        ]  # a wrong path is known before engines start
        if any(term.reward == COLLABORATIVE for term in train.rewards):
            corpus = str(settings.folder.resolve() / "corpus")
            self.options["collaborative"] = {"folder": corpus} | train.collaborative.model_dump()
        self.terms = [term.name for term in terms]
        self.own_terms = sum(not term.built_in for term in terms)
        self.restarts = 0
        self.workers = [_Worker(number, self._start(number)) for number in range(self.cluster.reward_workers)]

    def _start(self, number: int) -> Any:
        place = self.placement.options(REWARD, number, {}) if self.cluster.reward_cpus else {"num_cpus": 0}
        return RewardActor.options(**place).remote(*self.arguments, **self.options)

    def wait_until_started(self) -> None:
        """Raises RuntimeError that names the worker which does not start, or DeadlineExceeded."""
        for worker in self.workers:
            try:
                self._await_start(worker)
            except RayError as error:
                raise RuntimeError(f"{worker.name} did not start: {error}") from error

    def score(self, batches: Sequence[ray.ObjectRef], sizes: Sequence[int], *, responses: int) -> list[ScoredResponses]:
        """Scores of all groups of each batch.

        Args:
            batches: references of `RolloutBatch`, which are there already.
            sizes: groups of each.
            responses: of a group.
        """
        done: list[list[tuple[np.ndarray, ScoredResponses]]] = [[] for _ in batches]
        waiting = deque(_slices(sizes, len(self.workers)))
        running: dict[ray.ObjectRef, tuple[_Worker, _Slice, float]] = {}
        while waiting or running:
            busy = {worker for worker, _, _ in running.values()}
            for worker in [worker for worker in self.workers if worker not in busy][: len(waiting)]:
                one = waiting.popleft()
                numbers, groups = zip(*one.parts, strict=True)
                call = worker.actor.score_parts.remote(groups, *(batches[number] for number in numbers))
                running[call] = (worker, one, time.monotonic() + self._seconds(one.size * responses))
            soonest = min(deadline for _, _, deadline in running.values())
            ready, _ = ray.wait(list(running), timeout=max(0.0, soonest - time.monotonic()), fetch_local=False)
            late = [] if ready else [call for call, (_, _, deadline) in running.items() if time.monotonic() >= deadline]
            for call in (*ready, *late):
                worker, one, _ = running.pop(call)
                try:
                    if call in late:
                        raise TimeoutError("did not answer in time")
                    scores = ray.get(call, timeout=self.cluster.call_seconds)
                    for (number, some), of_batch in zip(one.parts, scores, strict=True):
                        done[number].append((some, of_batch))
                    worker.failures = 0
                except RayTaskError as error:
                    if lost(error):
                        raise WorkLost(f"the rollouts for {worker.name}: {lost_what(error)}") from error
                    raise  # an error of ours, such as a response outside the constraint
                except ObjectLostError as error:
                    raise WorkLost(f"the rollouts for {worker.name}: {lost_what(error)}") from error
                except (RayError, TimeoutError) as error:
                    cause = str(error) if isinstance(error, TimeoutError) else "died"
                    self._replace(worker, cause)
                    self._try_again(one, worker.name, cause, batches, waiting, done)
        return [_in_order(parts) for parts in done]

    def rollouts_of(self, batch: ray.ObjectRef, group: int) -> RolloutBatch:
        """The rollouts of one group alone: what a driver looks at must not bring a whole batch there.

        Raises what Ray raises where the worker or the rollouts are lost, and DeadlineExceeded.
        """
        worker = self.workers[0]
        call = worker.actor.select.remote(batch, np.array([group]))
        return await_result(call, f"a group from {worker.name}", self.cluster.call_seconds)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            ray.kill(worker.actor)

    def _seconds(self, responses: int) -> float:
        """Deadline of a call: what the rewards may take inside the worker, and as much as any call for the rest."""
        own = responses * self.own_terms * self.options["seconds_per_response"]
        return (
            min(own + self.cluster.reward_grace_seconds, self.cluster.call_seconds)
            if own
            else self.cluster.call_seconds
        )

    def _try_again(
        self, one: _Slice, name: str, cause: str, batches: Sequence[ray.ObjectRef], waiting: deque[_Slice],
        done: list[list[tuple[np.ndarray, ScoredResponses]]],
    ) -> None:  # fmt: skip
        """Put every group of a lost slice back by itself; give up one that was tried by itself."""
        if one.tries == 0 or one.size > 1:
            waiting.extend(
                _Slice([(batch, groups[place : place + 1])], 1)
                for batch, groups in one.parts
                for place in range(len(groups))
            )
            return
        ((number, groups),) = one.parts
        batch, group = ray.get(batches[number], timeout=self.cluster.call_seconds), int(groups[0])
        context = (
            f"weights of version {int(batch.weight_versions[group])}, true item row {int(batch.prompts.targets[group])}"
        )
        failure = RewardFailure(0, -1, ", ".join(self.terms), f"{name} {cause} while it scored this group", context)
        scores = ScoredResponses.unscored(int(batch.group_sizes[group]), len(self.terms), failure)
        done[number].append((groups, scores))

    def _replace(self, worker: _Worker, cause: str) -> None:
        """Start a worker anew, and once more where that one is lost too: a node's death is known later than that of the
        processes on it, so the first may have been sent there."""
        while True:
            worker.failures += 1
            ray.kill(worker.actor)
            if worker.failures > self.cluster.maximum_restarts:
                raise RuntimeError(
                    f"{worker.name} {cause}, {worker.failures} times in a row; look at the actor's log in Ray's "
                    "session folder, or raise cluster.maximum_restarts"
                )
            self.restarts += 1
            console.print(f"{worker.name} {cause}, and is started anew", style="yellow", highlight=False)
            worker.actor = self._start(worker.number)
            try:
                return self._await_start(worker)
            except (DeadlineExceeded, RayError) as error:
                cause = f"did not start again: {error}"

    def _await_start(self, worker: _Worker) -> None:
        started = worker.actor.started.remote()
        await_result(started, f"the start of {worker.name}", self.cluster.start_seconds)


def _slices(sizes: Sequence[int], workers: int) -> list[_Slice]:
    """All groups of batches of these sizes in about as many slices as there are workers: each call costs the driver
    something, and a worker without one is idle."""
    if len(sizes) >= workers:
        some = np.array_split(np.arange(len(sizes)), workers)
        return [_Slice([(batch, np.arange(sizes[batch])) for batch in numbers.tolist()]) for numbers in some]
    parts = -(-workers // max(len(sizes), 1))  # of a batch
    return [
        _Slice([(batch, groups)])
        for batch, size in enumerate(sizes)
        for groups in np.array_split(np.arange(size), min(size, parts))
    ]


def _in_order(parts: list[tuple[np.ndarray, ScoredResponses]]) -> ScoredResponses:
    """The scores of a batch, group after group."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([groups for groups, _ in parts]))
    return ScoredResponses.concatenate([scores for _, scores in parts]).select(order)
