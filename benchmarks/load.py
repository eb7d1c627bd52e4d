"""Load on an HTTP server on this machine: closed loop, so many clients that ask again at once, or open loop, requests
at times that a Poisson process gives whatever the answers do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Answers:
    """What came back: seconds of the answered requests, how many were refused (429, 503) or failed, the wall time."""

    seconds_N: np.ndarray
    refused: int
    failed: int
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
    """A POST with a JSON body; `check` raises where the answer is not what it should be."""

    url: str
    body: dict
    check: Callable[[dict], None]


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
    request.check(answer)


async def _run(work: Callable[[aiohttp.ClientSession, list[float], dict[str, int]], Awaitable[None]]) -> Answers:
    seconds: list[float] = []
    counts = {"refused": 0, "failed": 0}
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await work(session, seconds, counts)
    return Answers(np.array(seconds), counts["refused"], counts["failed"], time.perf_counter() - started)


def closed_loop(requests: Sequence[Request], *, clients: int, seconds: float) -> Answers:
    """`clients` of them ask one after the other, going round through the requests, for so long."""

    async def work(session: aiohttp.ClientSession, taken: list[float], counts: dict[str, int]) -> None:
        end = time.perf_counter() + seconds
        turn = iter(range(10**9))

        async def client() -> None:
            while time.perf_counter() < end:
                await _one(session, requests[next(turn) % len(requests)], taken, counts)

        await asyncio.gather(*(client() for _ in range(clients)))

    return asyncio.run(_run(work))


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
