"""Concurrent requests put together: what comes while a batch is worked on shares the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class RequestBatches(Generic[Request, Result]):
    """One batch at a time, of all that wait when the one before is done.

    Serve's own batching closes a batch when its waiting time is over, and lets it wait then: under load the batches
    stay as small as what comes within that time.

    Args:
        work: gives as many results as it gets requests, in their order.
        most: requests of one batch at most.
        wait_seconds: how long a request that finds nobody working waits for others.
    """

    def __init__(
        self, work: Callable[[list[Request]], Awaitable[Sequence[Result]]], *, most: int, wait_seconds: float
    ) -> None:
        self.work, self.most, self.wait_seconds = work, most, wait_seconds
        self.waiting: deque[tuple[Request, asyncio.Future[Result]]] = deque()
        self.working: asyncio.Task[None] | None = None

    async def result(self, request: Request) -> Result:
        """The result of a request, or the error of its batch. One that is cancelled while it waits costs no work."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        if self.working is None or self.working.done():
            # In a context of its own: the batches are not this request's.
            self.working = asyncio.create_task(self._work_off(), context=Context())
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
