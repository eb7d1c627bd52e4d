"""The driver of `benchmarks.scale`: the train stage's own loop over a simulated fleet, in a process of its own.

    python -m benchmarks.scale_driver '{"address": "127.0.0.1:6379", "engines": 8, ...}'

`benchmarks.scale` starts it and reads the JSON of the last line. Loop, scheduler, engines, reward pool and learner
ranks are those of the train stage, prompts come from its prompt source; only what they start is simulated.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from benchmarks.scale_fleet import EnginesActor, Pace, RanksActor, RewardsActor

ITEMS, USERS, HISTORY = 10_000, 4_000, 24
ENGINE_PROCESSES, REWARD_PROCESSES = 12, 3  # with one for learner ranks, 16
ENGINES_PER_WORKER, ENGINES_PER_RANK = 8, 16
DEADLINE = 300.0
TCP_BYTES_AT = 120  # in the kernel's tcp_info: bytes acknowledged and bytes received, 64 bits each


@dataclass(frozen=True)
class Task:
    """What one driver does: `steps` measured steps after one to warm up; `seconds_per_token` is the engines'."""

    address: str
    engines: int
    prompts: int
    responses: int
    reasoning_budget: int
    steps: int
    seconds_per_token: float = Pace.token
    engine_processes: int = ENGINE_PROCESSES


@dataclass(frozen=True)
class LogicalActor:
    """Stands for the handle of one actor: its calls go to the process that plays it, with its number in front."""

    process: Any
    number: int
    calls: Counter[str]

    def __getattr__(self, method: str) -> LogicalMethod:
        return LogicalMethod(self, method)


@dataclass(frozen=True)
class LogicalMethod:
    actor: LogicalActor
    method: str
    chosen: dict[str, Any] = field(default_factory=dict)

    def options(self, **options: Any) -> LogicalMethod:
        return LogicalMethod(self.actor, self.method, options)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        self.actor.calls[self.method] += 1
        method = getattr(self.actor.process, self.method)
        return (method.options(**self.chosen) if self.chosen else method).remote(self.actor.number, *arguments, **named)


def simulated_actors(settings: Any, processes: dict[str, list[Any]], calls: Counter[str]) -> Any:
    """The actors of the loop, with logical ones in the places of real ones."""
    from cluster.learner_ranks import LearnerRanks
    from cluster.reward_pool import RewardPool
    from cluster.rollout_engines import RolloutEngines
    from cluster.srpo_actors import SrpoActors

    def played(kind: str, number: int) -> LogicalActor:
        return LogicalActor(processes[kind][number % len(processes[kind])], number, calls)

    class Engines(RolloutEngines):
        def _start(self, number: int, placement: Any) -> LogicalActor:
            return played("engines", number)

    class Rewards(RewardPool):
        def _start(self, number: int) -> LogicalActor:
            return played("rewards", number)

    class Ranks(LearnerRanks):
        def _start(self) -> None:
            self.ranks = [played("ranks", rank) for rank in range(self.settings.train.ranks)]

    nowhere: Any = None
    return SrpoActors(
        Ranks(nowhere, settings, "", ""), Engines(nowhere, settings, "", ""), Rewards(nowhere, settings, "", ""),
        settings.cluster.weight_chunk_mib * 2**20,
    )  # fmt: skip


def prompt_source(settings: Any) -> Any:
    """The run's own `PromptSource` over a random catalogue and random histories."""
    from benchmarks.rollouts import random_index
    from cluster.prompts import PromptSource
    from curriculum.interactions import UserSequences
    from curriculum.prompts import PromptBuilder
    from curriculum.tokenizer import train_tokenizer
    from item_index.tokens import SemanticIdTokens

    index = random_index(ITEMS)
    tokenizer = train_tokenizer([], index, vocabulary_size=400)
    items = np.random.default_rng(0).integers(0, ITEMS, USERS * HISTORY)
    offsets = np.arange(0, USERS * HISTORY + 1, HISTORY)
    corpus: Any = SimpleNamespace(
        index=index, builder=PromptBuilder(tokenizer, index, SemanticIdTokens.of(tokenizer, index)),
        sequences=UserSequences(tuple(range(USERS)), offsets, items, np.zeros(len(items), np.int64)),
        held_out=np.zeros(len(items), bool),
    )  # fmt: skip
    return PromptSource(corpus, reasoning_budget=settings.train.reasoning_budget, exclude_seen=True)


def tcp_bytes() -> int:
    """Bytes that this process has sent and received over the TCP connections it has now, by the kernel's count."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            one = socket.socket(fileno=os.dup(int(name)))
        except FileNotFoundError:  # closed since it was listed
            continue
        with one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                state = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += sum(struct.unpack_from("QQ", state, TCP_BYTES_AT))
    return total


@contextmanager
def fleet(task: Task) -> Iterator[dict[str, list[Any]]]:
    """The processes that play the actors, on all nodes, by what they play."""
    from actors.rollout import environment
    from cluster.rollout_engines import ROLLOUTS_STAY

    pace = Pace(token=task.seconds_per_token)
    place = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
    engine_place = {**place, "runtime_env": {"env_vars": environment("v1") | ROLLOUTS_STAY}}
    processes = {
        "engines": [EnginesActor.options(**engine_place).remote(pace) for _ in range(task.engine_processes)],
        "rewards": [RewardsActor.options(**place).remote(pace) for _ in range(REWARD_PROCESSES)],
        "ranks": [RanksActor.options(**place).remote(pace)],
    }
    yield processes
    given(processes)  # says whether one of them has imported torch


def given(processes: dict[str, list[Any]]) -> dict[str, int]:
    """Bytes that the fleet has given so far, by kind."""
    return {
        kind: sum(ray.get([one.given.remote() for one in some], timeout=DEADLINE)) for kind, some in processes.items()
    }


def measure(task: Task) -> dict[str, float]:
    """Medians over the measured steps."""
    from cluster.settings import load_settings
    from cluster.train import SrpoLoop

    settings = load_settings(
        None,
        [
            f"cluster.rollout_engines={task.engines}", f"train.prompts_per_step={task.prompts}",
            f"cluster.reward_workers={max(1, task.engines // ENGINES_PER_WORKER)}",
            f"train.ranks={max(1, task.engines // ENGINES_PER_RANK)}", "train.mini_batch_prompts=1",
            f"train.responses={task.responses}", f"train.reasoning_budget={task.reasoning_budget}",
            f"train.steps={task.steps + 1}", f"train.weight_check_steps={task.steps + 1}",
        ],
    )  # fmt: skip
    source = prompt_source(settings)
    ray.init(address=task.address, log_to_driver=False, logging_level=logging.ERROR)
    calls: Counter[str] = Counter()
    measured: list[dict[str, float]] = []
    with fleet(task) as processes:
        loop = SrpoLoop(settings, source, simulated_actors(settings, processes, calls))
        for step in range(1, task.steps + 2):
            before, stored = calls.total(), given(processes)
            seconds, cpu_seconds, passed = time.perf_counter(), time.process_time(), tcp_bytes()
            metrics = loop.step(step)
            numbers = {
                "driver CPU": time.process_time() - cpu_seconds,
                "step": time.perf_counter() - seconds,
                "through the driver": float(tcp_bytes() - passed),
            }
            now = given(processes)
            numbers["messages"] = float(2 * (calls.total() - before) + Pace.chunks)
            numbers["rollouts stored"] = float(now["engines"] - stored["engines"])
            numbers["weights stored"] = float(now["ranks"] - stored["ranks"])
            numbers["groups"] = metrics["groups_generated"]
            numbers["tokens"] = metrics["tokens_generated"]
            measured.append(numbers)
    ray.shutdown()
    print(json.dumps(measured), file=sys.stderr)
    del measured[0]
    worst = max(one["driver CPU"] for one in measured)
    return {name: float(np.median([one[name] for one in measured])) for name in measured[0]} | {
        "driver CPU, most": worst
    }


def command(task: Task) -> list[str]:
    """The command line that measures the task in a process of its own."""
    return [sys.executable, "-m", "benchmarks.scale_driver", json.dumps(asdict(task))]


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
