"""Load on an HTTP server on this machine: closed loop, so many clients that ask again at once, or open loop, requests
at times that a Poisson process gives whatever the answers do."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Answers:
    """What came back.

    Attributes:
        seconds_N: of the answered requests.
        refused: answers 429 and 503.
        failed: other answers, and requests that got none.
        invalid: places in answered lists that hold no item, or one that stands further up.
        wall: seconds that all took.
    """

    seconds_N: np.ndarray
    refused: int
    failed: int
    invalid: int
    wall: float

    @property
    def throughput(self) -> float:
        """Answers per second."""
        return len(self.seconds_N) / self.wall

    def percentile(self, percent: float) -> float:
        """Seconds."""
        return float(np.percentile(self.seconds_N, percent)) if len(self.seconds_N) else float("nan")


@dataclass(frozen=True)
class Request:
    """A POST with a JSON body; `invalid` counts the places of its answer that hold no item."""

    url: str
    body: dict[str, Any]
    invalid: Callable[[dict[str, Any]], int]


async def _one(session: aiohttp.ClientSession, request: Request, seconds: list[float], counts: dict[str, int]) -> None:
    started = time.perf_counter()
    try:
        async with session.post(request.url, json=request.body) as response:
            answer = await response.json()
            if response.status in (429, 503):
                counts["refused"] += 1
                return
            if response.status != 200:
                counts["failed"] += 1
                return
    except (TimeoutError, aiohttp.ClientError):
        counts["failed"] += 1
        return
    seconds.append(time.perf_counter() - started)
    counts["invalid"] += request.invalid(answer)


async def _run(work: Callable[[aiohttp.ClientSession, list[float], dict[str, int]], Awaitable[None]]) -> Answers:
    seconds: list[float] = []
    counts = {"refused": 0, "failed": 0, "invalid": 0}
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await work(session, seconds, counts)
    return Answers(np.array(seconds), **counts, wall=time.perf_counter() - started)


def closed_loop(groups: Sequence[tuple[Sequence[Request], int]], *, seconds: float) -> list[Answers]:
    """Of each group so many clients ask one after the other, going round through its requests, all at the same time
    and for so long. Gives the answers of each group."""

    async def group_of(requests: Sequence[Request], clients: int) -> Answers:
        async def work(session: aiohttp.ClientSession, taken: list[float], counts: dict[str, int]) -> None:
            end = time.perf_counter() + seconds
            turn = itertools.count()

            async def client() -> None:
                while time.perf_counter() < end:
                    await _one(session, requests[next(turn) % len(requests)], taken, counts)

            await asyncio.gather(*(client() for _ in range(clients)))

        return await _run(work)

    async def together() -> list[Answers]:
        return await asyncio.gather(*(group_of(requests, clients) for requests, clients in groups))

    return asyncio.run(together())


def open_loop(requests: Sequence[Request], *, rate: float, seconds: float, seed: int) -> Answers:
    """Requests at `rate` per second on the average, drawn by the seed."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds)))

    async def work(session: aiohttp.ClientSession, taken: list[float], counts: dict[str, int]) -> None:
        started = time.perf_counter()
        under_way = []
        for number, at in enumerate(times):
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - started)))
            under_way.append(asyncio.create_task(_one(session, requests[number % len(requests)], taken, counts)))
        await asyncio.gather(*under_way)

    return asyncio.run(_run(work))
