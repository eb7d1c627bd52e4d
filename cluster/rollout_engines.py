"""The rollout engines of a stage: their calls in order, each with a deadline; a lost one is started anew."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.rollout import RolloutActor, environment
from cluster.additional_engines import AdditionalEngines
from cluster.bundles import ENGINE
from cluster.placement import DeadlineExceeded, Placement, WorkLost, await_result, lost, lost_what
from cluster.progress import console
from cluster.settings import Settings
from learner.rollouts import RolloutPrompts

# Ray sends results below 100 KiB along with the answer, and from the driver again to every actor that gets them: each
# reward worker and each learner rank. Rollouts are to stay in the object store; what is below 4 KiB may travel.
ROLLOUTS_STAY = {"RAY_max_direct_call_object_size": "4096"}

GATHER_SECONDS = 0.02  # for answers that come together


@dataclass(eq=False)
class EngineCall:
    """A call of one engine, which is made again where the engine is lost before it has answered.

    Attributes:
        what: is asked for, in words.
        submit: makes the call of an actor; the last reference it returns is that of a small result.
        prompts: int64, places of a generation's prompts among all that were given to `generate`.
        references: of the latest try.
        result: what came back, once it is `done`.
    """

    what: str
    submit: Callable[[Any], list[ray.ObjectRef]]
    brings_weights: bool = False
    prompts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    references: list[ray.ObjectRef] = field(default_factory=list)
    result: Any = None
    done: bool = False


def prompt_order(calls: Sequence[EngineCall]) -> np.ndarray:
    """int64: where each prompt's group stands in the batches of these generations, put one after the other."""
    return np.argsort(np.concatenate([call.prompts for call in calls]))


class _Engine:
    """One actor, its calls that have not been answered yet, and how often it was lost since it last answered."""

    def __init__(self, number: int, actor: Any) -> None:
        self.name = f"rollout engine {number}"
        self.number, self.actor = number, actor
        self.queue: deque[EngineCall] = deque()
        self.head_since = 0.0
        self.failures = 0


class RolloutEngines:
    """`cluster.rollout_engines` engines in their places.

    An engine works on its calls in the order in which they were made, so weights that are sent while it generates are
    taken up after that generation: no response has tokens of two versions. An engine is lost when its process dies,
    when it does not answer a health check, when a call is late, or when weights do not get through. It is then killed
    and started anew, gets the latest weights, and then all calls that it still owed, with the same seeds. After
    `cluster.maximum_restarts` losses in a row RuntimeError names the engine and the last cause.

    With `elastic`, `cluster.additional_engines` more join, with the latest weights, where a generation begins after
    they have started. One of these that is lost leaves instead, and what it owed is given to the others.
    """

    def __init__(
        self, placement: Placement, settings: Settings, index: str, model: str, *, elastic: bool = False,
        constrained: bool = True,
    ) -> None:  # fmt: skip
        self.constrained = constrained
        self.placement, self.settings, self.cluster, self.index = placement, settings, settings.cluster, index
        self.model, self.model_version = model, 0
        self.chunks: ray.ObjectRef | None = None  # a list of references, sent to each engine as one
        self.restarts = 0
        self.engines = [
            _Engine(number, self._start(number, placement)) for number in range(self.cluster.rollout_engines)
        ]
        self.additional = AdditionalEngines(self.cluster, self._start) if elastic else None

    def wait_until_started(self) -> None:
        """Say which sampler each engine has. Raises DeadlineExceeded, and what an engine raises when it starts."""
        for engine in self.engines:
            call = engine.actor.sampler_in_use.remote()
            sampler = await_result(call, f"the start of {engine.name}", self.cluster.start_seconds)
            console.print(f"{engine.name}: sampler {sampler}")

    def close(self) -> None:
        """Give the places of additional engines back; those of the others are the caller's."""
        if self.additional is not None:
            self.additional.close()

    def _start(self, number: int, placement: Placement) -> Any:
        cluster = self.cluster
        variables = environment(cluster.model_runner, tensor_parallel=cluster.tensor_parallel) | ROLLOUTS_STAY
        place = placement.options(ENGINE, number, variables)
        return RolloutActor.options(**place).remote(
            self.model, self.index, weight_version=self.model_version, dtype=cluster.dtype,
            kv_cache_mib=cluster.kv_cache_mib, sequences=cluster.rollout_sequences, threads=cluster.threads,
            seed=self.settings.seed, sampler=cluster.rollout_sampler, model_runner=cluster.model_runner,
            tensor_parallel=cluster.tensor_parallel, weight_transfer=cluster.weight_transfer,
            constrained=self.constrained,
        )  # fmt: skip

    def generate(
        self, prompts: RolloutPrompts, *, responses: int, seeds: Sequence[int], temperature: float
    ) -> list[EngineCall]:
        """Spread the prompts over the engines, new ones among them; a call for each engine that has a share.

        The first reference of a finished call is that of its `RolloutBatch`, which stays in the object store; the
        result is its `GenerationSummary`.
        """
        self._take_in()
        calls = []
        for number, engine in enumerate(self.engines):
            share = np.arange(number, len(prompts), len(self.engines))
            if not len(share):
                continue
            arguments = {
                "responses": responses,
                "seeds": [seeds[row] for row in share.tolist()],
                "temperature": temperature,
            }
            part = prompts.select(share)

            def submit(actor: Any, part: RolloutPrompts = part, arguments: dict[str, Any] = arguments) -> list:
                return actor.generate_with_summary.remote(part, **arguments)

            calls.append(EngineCall(f"the rollouts of {len(share)} prompts", submit, prompts=share))
            self._put(engine, calls[-1])
        return calls

    def update_weights(self, chunks: Sequence[ray.ObjectRef]) -> list[EngineCall]:
        """Send the weights of a new version to all engines; the result of each call is the version."""
        self.chunks = ray.put(list(chunks))
        return self._to_all(self._weight_transfer)

    def _weight_transfer(self) -> EngineCall:
        seconds = self.cluster.call_seconds

        def submit(actor: Any) -> list[ray.ObjectRef]:
            return [actor.update_weights.remote(self.chunks, seconds=seconds)]

        return EngineCall("the weight transfer", submit, brings_weights=True)

    def load_weights(self, model: str, version: int) -> list[EngineCall]:
        """Let all engines load another checkpoint of the same model and tokenizer."""
        self.model, self.model_version, self.chunks = model, version, None

        def submit(actor: Any) -> list[ray.ObjectRef]:
            return [actor.load_weights.remote(model, version)]

        return self._to_all(lambda: EngineCall("the reload", submit, brings_weights=True))

    def probe_weights(self, tokens: np.ndarray) -> list[EngineCall]:
        """Ask all engines what they say of their weights, with some tokens; the result of each is a `WeightProbe`."""

        def submit(actor: Any) -> list[ray.ObjectRef]:
            return [actor.probe_weights.remote(tokens)]

        return self._to_all(lambda: EngineCall("the weight check", submit))

    def forget(self) -> None:
        """Leave the answers of all calls so far alone. Engines still work them off, one after the other."""
        for engine in self.engines:
            engine.queue.clear()

    def wait(self, calls: Sequence[EngineCall]) -> None:
        """Until all these calls, and those made before them, are done; lost engines are started anew meanwhile.

        Raises RuntimeError that names the engine where a call ends with an error of its own, or where an engine is lost
        too often.
        """
        missing = {call for call in calls if not call.done}
        while True:
            owing = [engine for engine in self.engines if missing.intersection(engine.queue)]
            if not owing:
                return
            heads = {engine.queue[0].references[-1]: engine for engine in owing}
            ready, _ = ray.wait(list(heads), timeout=self.cluster.health_seconds, fetch_local=False)
            if ready:  # and those that come with it: a round of waiting costs as much for one answer as for hundreds
                ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=GATHER_SECONDS, fetch_local=False)
            for reference in ready:
                self._take_answer(heads[reference], reference)
            if not ready:
                self._check_health(owing)

    def _take_in(self) -> None:
        """Let additional engines that have started take part from now on."""
        for number, actor in self.additional.arrived() if self.additional is not None else ():
            self.engines.append(_Engine(number, actor))
            if self.chunks is not None:
                self._put(self.engines[-1], self._weight_transfer())

    def _to_all(self, make: Callable[[], EngineCall]) -> list[EngineCall]:
        calls = [make() for _ in self.engines]
        for engine, call in zip(self.engines, calls, strict=True):
            self._put(engine, call)
        return calls

    def _put(self, engine: _Engine, call: EngineCall) -> None:
        call.references = call.submit(engine.actor)
        if not engine.queue:
            engine.head_since = time.monotonic()
        engine.queue.append(call)

    def _take_answer(self, engine: _Engine, reference: ray.ObjectRef) -> None:
        call = engine.queue[0]
        try:
            call.result = ray.get(reference, timeout=self.cluster.call_seconds)
        except RayTaskError as error:
            if lost(error):  # what the call was given, not the engine
                raise WorkLost(f"{engine.name}, {call.what}: {lost_what(error)}") from error
            if not call.brings_weights:
                raise RuntimeError(f"{engine.name}, {call.what}: {error.cause}") from error
            return self._restart(engine, f"{call.what} failed: {error.cause}")
        except (GetTimeoutError, ray.exceptions.RayError) as error:
            return self._restart(engine, f"it was lost during {call.what}: {type(error).__name__}")
        call.done = True
        engine.queue.popleft()
        engine.head_since, engine.failures = time.monotonic(), 0

    def _check_health(self, owing: Sequence[_Engine]) -> None:
        """Start engines anew whose call is late, or that do not answer at all."""
        pings = {engine.number: engine.actor.health.remote() for engine in owing}
        ray.wait(list(pings.values()), num_returns=len(pings), timeout=self.cluster.health_seconds)
        for engine in owing:
            answered, _ = ray.wait([pings[engine.number]], timeout=0)
            if not answered:
                self._restart(engine, f"it has not answered a health check for {self.cluster.health_seconds:.0f} s")
            elif time.monotonic() - engine.head_since > self.cluster.call_seconds:
                late = f"{engine.queue[0].what} did not arrive within {self.cluster.call_seconds:.0f} s"
                self._restart(engine, f"{late} (cluster.call_seconds)")

    def _restart(self, engine: _Engine, cause: str) -> None:
        """Kill an engine, start it with the latest weights, and give it the calls again that it still owes."""
        owed = [call for call in engine.queue if not call.brings_weights]
        superseded = [call for call in engine.queue if call.brings_weights]
        if self.additional is not None and engine.number in self.additional:
            ray.kill(engine.actor, no_restart=True)
            self.engines.remove(engine)
            self.additional.leave(engine.number, cause)
            for call in superseded:
                call.done = True
            for call in owed:
                self._put(min(self.engines, key=lambda other: len(other.queue)), call)
            return
        while True:
            engine.failures += 1
            if self.cluster.weight_transfer != "object_store":
                raise RuntimeError(
                    f"{engine.name} was lost because {cause}; its connection with the learner "
                    f"(cluster.weight_transfer {self.cluster.weight_transfer}) cannot be made again in mid-run"
                )
            ray.kill(engine.actor, no_restart=True)
            if engine.failures > self.cluster.maximum_restarts:
                raise RuntimeError(
                    f"{engine.name} was lost {engine.failures} times in a row, the last time because {cause}; look at "
                    "the actor's log in Ray's session folder, or raise cluster.maximum_restarts"
                )
            self.restarts += 1
            console.print(f"{engine.name} is started anew: {cause}", style="yellow", highlight=False)
            try:
                version = self._start_again(engine)
                break
            except (DeadlineExceeded, ray.exceptions.RayError) as error:
                cause = f"it did not start again: {error}"
        for call in superseded:
            call.result, call.done = version, True
        engine.queue.clear()
        for call in owed:
            self._put(engine, call)

    def _start_again(self, engine: _Engine) -> int:
        """The version of the weights that the new process has."""
        cluster, actor = self.cluster, self._start(engine.number, self.placement)
        engine.actor = actor
        await_result(actor.sampler_in_use.remote(), f"the start of {engine.name}", cluster.start_seconds)
        if self.chunks is None:
            return self.model_version
        update = actor.update_weights.remote(self.chunks, seconds=cluster.call_seconds)
        try:
            return await_result(update, f"the weight transfer to {engine.name}", cluster.call_seconds)
        except ray.exceptions.RayTaskError as error:
            if lost(error):  # the learner's node is gone, and the weights with it
                raise WorkLost(f"the weights for {engine.name}: {lost_what(error)}") from error
            raise
