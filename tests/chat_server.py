"""A real HTTP server on this machine that speaks the chat completion protocol, well or badly, as a test wants it."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

# What the n-th request about a subject gets: an answer, a response of its own making, something to await that gives
# either, or seconds to wait before a description.
Behaviour = Callable[[str, int], Any]


def completion(text: Any, finish_reason: str = "stop", usage: Any = None) -> dict[str, Any]:
    """The body of a chat completion; it reports usage where that is given."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "scribe",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage,
    }  # fmt: skip


def title_of(prompt: str) -> str:
    """The item's title, which the behaviours go by."""
    return prompt.splitlines()[0].removeprefix("Title: ")


def describe(title: str, _: int) -> str:
    """The well-behaved endpoint."""
    return f"A fine thing called {title}."


class ChatServer:
    """Serves while it is entered.

    Attributes:
        url: base URL for a client.
        behaviour: (subject, number of its request) -> str for an answer, or an aiohttp response, or a float for
            seconds of silence before an answer.
        bodies, headers: of all requests, in the order of their arrival.
        most_at_once: the largest number of requests that were under way together.
    """

    def __init__(self, behaviour: Behaviour = describe, subject_of: Callable[[str], str] = title_of) -> None:
        self.behaviour = behaviour
        self._subject_of = subject_of
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._under_way = 0
        self._ready = threading.Event()

    @property
    def asked(self) -> Counter[str]:
        """Requests about each subject."""
        return Counter(self._subject_of(body["messages"][-1]["content"]) for body in self.bodies)

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self._ready.set()
        await self._stopped.wait()
        await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        subject = self._subject_of(body["messages"][-1]["content"])
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await asyncio.sleep(0.005)  # so that requests that may overlap do
            answer = self.behaviour(subject, self.asked[subject])
            if inspect.isawaitable(answer):
                answer = await answer
            if isinstance(answer, float):
                await asyncio.sleep(answer)
                answer = describe(subject, 1)
            return answer if isinstance(answer, web.StreamResponse) else web.json_response(completion(answer))
        finally:
            self._under_way -= 1
