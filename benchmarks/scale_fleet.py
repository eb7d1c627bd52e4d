"""A simulation of the actors of the train stage: up to 16 processes that stand for hundreds, and import no torch.

Each process plays several engines, reward workers or learner ranks, told apart by their numbers. It sleeps as long as
the one it plays would work, and answers with arrays of the same types, sizes and classes, filled at random. An answer
whose class is in a module that imports torch (or vLLM) travels as its name and fields, and is built where it arrives.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np
import ray

from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch, RolloutPrompts
from rewards.chains import CHAIN

VOCABULARY = 150_000
ENGINE_TENSORS, LEARNER_TENSORS = 255, 399  # of Qwen3-4B, where vLLM fuses query, key and value, and gate and up


@dataclass(frozen=True)
class Pace:
    """How fast the simulated actors are, and what they give.

    Attributes:
        token: seconds for the next token of all responses that an engine decodes.
        score: seconds of a reward worker for a response.
        update: seconds of all learner ranks for an update.
        load: seconds of an engine that loads weights which are there.
        varied: share of the groups whose rewards differ.
        chunks: objects that the weights of a version are.
        chunk_bytes: of each, far less than real ones have.
    """

    token: float = 0.005
    score: float = 0.0005
    update: float = 0.5
    load: float = 0.2
    varied: float = 0.6
    chunks: int = 30
    chunk_bytes: int = 512 * 1024


class BuiltOnArrival:
    """An object of a class that this process does not import."""

    def __init__(self, name: str, **values: Any) -> None:
        self.name, self.values = name, values

    def __reduce__(self) -> tuple[Any, ...]:
        return build, (self.name, self.values)


def build(name: str, values: dict[str, Any]) -> Any:
    """An object of the class `package.module.Class`."""
    module, _, kind = name.rpartition(".")
    return getattr(import_module(module), kind)(**values)


def array_bytes(value: Any) -> int:
    """Bytes of all arrays in nested dataclasses."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    names = [field.name for field in fields(value)] if hasattr(value, "__dataclass_fields__") else []
    return sum(array_bytes(getattr(value, name)) for name in names)


class SimulatedProcess:
    """What all kinds have: no torch, a count of the bytes that they gave, and their calls one after the other."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.version, self.bytes_given = pace, 0, 0
        self.generator = np.random.default_rng(0)
        self.turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def given(self) -> int:
        """Bytes of rollouts and weights that were given so far. Raises RuntimeError where torch has been imported."""
        if "torch" in sys.modules:
            raise RuntimeError("a process of the simulated fleet has imported torch")
        return self.bytes_given


class SimulatedEngines(SimulatedProcess):
    """The methods of `actors.rollout.RolloutEngine` that a run calls, each with the engine's number in front."""

    first_chunk: ray.ObjectRef | None = None
    arrived: asyncio.Future[list[Any]]

    async def sampler_in_use(self, engine: int) -> str:
        return "simulated"

    async def health(self, engine: int) -> tuple[str, int]:
        return "simulated", engine

    @ray.method(num_returns=2)  # type: ignore[arg-type]  # its type knows methods of one argument alone
    async def generate_with_summary(
        self, engine: int, prompts: RolloutPrompts, *, responses: int, seeds: Sequence[int], temperature: float
    ) -> tuple[RolloutBatch, BuiltOnArrival]:
        async with self.turns[engine]:
            started = time.perf_counter()
            budgets_R = np.repeat(prompts.budgets, responses)
            shortest_R = np.where(np.repeat(prompts.reasoning, responses), budgets_R // 4, budgets_R)
            lengths_R = self.generator.integers(shortest_R, budgets_R, endpoint=True)
            await asyncio.sleep(self.pace.token * int(lengths_R.max()))
            offsets = np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int64)
            total = int(offsets[-1])
            batch = RolloutBatch(
                prompts, np.full(len(prompts), responses, np.int64),
                RaggedArray(self.generator.integers(0, VOCABULARY, total, dtype=np.int32), offsets),
                RaggedArray(-self.generator.random(total, dtype=np.float32), offsets),
                np.full(len(prompts), self.version, np.int64), "simulated",
            )  # fmt: skip
            self.bytes_given += array_bytes(batch)
            summary = BuiltOnArrival(
                "actors.rollout.GenerationSummary", weight_version=self.version, tokens=total,
                seconds=time.perf_counter() - started,
            )  # fmt: skip
            return batch, summary

    async def update_weights(self, engine: int, chunks: Sequence[ray.ObjectRef], *, seconds: float) -> int:
        if self.first_chunk != chunks[0]:  # once for all engines that this process plays: it has one object store
            self.first_chunk, self.arrived = chunks[0], asyncio.gather(*chunks)
        async with self.turns[engine]:
            arrived = await asyncio.wait_for(asyncio.shield(self.arrived), seconds)
            await asyncio.sleep(self.pace.load)
            self.version = arrived[-1][0]
            return self.version

    async def probe_weights(self, engine: int, tokens: np.ndarray) -> BuiltOnArrival:
        async with self.turns[engine]:
            sums = [((f"model.layers.{number}.weight",), 0.0, "bfloat16", False) for number in range(ENGINE_TENSORS)]
            return BuiltOnArrival(
                "learner.weight_probe.WeightProbe", version=self.version, sums=sums,
                log_probabilities_T=np.zeros(len(tokens) - 1, np.float32),
            )  # fmt: skip


class SimulatedRewards(SimulatedProcess):
    """The methods of `actors.reward.RewardWorker`; whether a group's rewards differ is drawn."""

    async def started(self, worker: int) -> bool:
        return True

    async def score_parts(
        self, worker: int, groups: Sequence[np.ndarray], *batches: RolloutBatch
    ) -> list[BuiltOnArrival]:
        await asyncio.sleep(self.pace.score * sum(len(batch.responses) for batch in batches))
        return [self.scores(batch.select(some)) for batch, some in zip(batches, groups, strict=True)]

    def scores(self, batch: RolloutBatch) -> BuiltOnArrival:
        count = len(batch.responses)
        varied_R = np.repeat(self.generator.random(len(batch)) < self.pace.varied, batch.group_sizes)
        first_R = np.isin(np.arange(count), batch.group_starts[:-1])
        rewards = np.where(varied_R & first_R, np.float32(1), np.float32(0.25)).astype(np.float32)
        yes = np.ones(count, bool)
        return BuiltOnArrival(
            "actors.reward.ScoredResponses", group_sizes=batch.group_sizes, scored=np.ones(len(batch), bool),
            rewards=rewards, components=rewards[:, None], hits=rewards == 1, valid=yes, well_formed=yes, forced=~yes,
            items=self.generator.integers(0, 10_000, count, dtype=np.int32),
            lengths=batch.responses.lengths.astype(np.int32), chains=np.zeros(count, CHAIN),
        )  # fmt: skip


class SimulatedRanks(SimulatedProcess):
    """The methods of `actors.learner.LearnerRank` that a step calls; rank 0 has the weights."""

    async def update(
        self, rank: int, members: np.ndarray, advantages: RaggedArray, *batches: RolloutBatch, record: Any
    ) -> dict[str, float]:
        await asyncio.sleep(self.pace.update)
        if rank == 0:
            self.version += 1
        return {"loss": 0.0, "groups": float(len(members))}

    async def weight_chunks(self, rank: int, chunk_bytes: int) -> AsyncIterator[tuple[int, np.ndarray] | None]:
        if rank:
            yield None
            return
        for _ in range(self.pace.chunks):
            self.bytes_given += self.pace.chunk_bytes
            yield self.version, np.zeros(self.pace.chunk_bytes, np.uint8)

    async def probe_weights(self, rank: int, tokens: np.ndarray) -> BuiltOnArrival:
        kind = "learner.weight_probe.LearnerSum"
        sums = {
            f"model.layers.{number}.weight": BuiltOnArrival(kind, total=0.0, absolute=1.0, dtype="bfloat16")
            for number in range(LEARNER_TENSORS)
        }
        return BuiltOnArrival(
            "learner.weight_probe.WeightProbe", version=self.version, sums=sums,
            log_probabilities_T=np.zeros(len(tokens) - 1, np.float32),
        )  # fmt: skip


EnginesActor: Any = ray.remote(SimulatedEngines)
RewardsActor: Any = ray.remote(SimulatedRewards)
RanksActor: Any = ray.remote(SimulatedRanks)
