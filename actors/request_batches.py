"""Concurrent requests put together: what comes while batches are worked on shares the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class RequestBatches(Generic[Request, Result]):
    """So many batches at once, each of all that wait when one before is done.

    Serve's own batching closes a batch when its waiting time is over, and lets it wait then: under load the batches
    stay as small as what comes within that time.

    Args:
        work: gives as many results as it gets requests, in their order.
        most: requests of one batch at most.
        at_once: batches that are worked on at once.
        wait_seconds: how long a request that need not wait for a batch waits for others.

    Attributes:
        waiting: requests that are in no batch yet.
    """

    def __init__(
        self, work: Callable[[list[Request]], Awaitable[Sequence[Result]]], *, most: int, at_once: int = 1,
        wait_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self.work, self.most, self.at_once, self.wait_seconds = work, most, at_once, wait_seconds
        self.waiting: deque[tuple[Request, asyncio.Future[Result]]] = deque()
        self.working: list[asyncio.Task[None]] = []

    async def result(self, request: Request) -> Result:
        """The result of a request, or the error of its batch. One that is cancelled while it waits costs no work."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        self.working = [task for task in self.working if not task.done()]
        if len(self.working) < self.at_once:
            # In a context of its own: the batches are not this request's.
            self.working.append(asyncio.create_task(self._work_off(), context=Context()))
        return await future

    async def _work_off(self) -> None:
        await asyncio.sleep(self.wait_seconds)
        while self.waiting:
            taken = [self.waiting.popleft() for _ in range(min(self.most, len(self.waiting)))]
            batch = [(request, future) for request, future in taken if not future.cancelled()]
            if not batch:
                continue
            try:
                results = await self.work([request for request, _ in batch])
                answered = list(zip(batch, results, strict=True))
            except Exception as error:
                for _, future in batch:
                    if not future.cancelled():
                        future.set_exception(error)
                continue
            for (_, future), result in answered:
                if not future.cancelled():
                    future.set_result(result)
