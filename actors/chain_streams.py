"""Reasoning chains of many requests, decoded together by one vLLM engine and handed out token by token."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import torch

from actors.rollout import RolloutEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChainTokens:
    """New tokens of one chain of a request; the last of a chain is `<answer>`, and then it has `ended`."""

    chain: int
    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Listener:
    """Who gets a request's tokens, and what the engine itself calls the request."""

    hand_over: Callable[[ChainTokens | BaseException], None]
    engine_id: str


class ChainStreams:
    """Feeds the engine from a thread of its own, which decodes one token of all open chains at a time.

    Requests come and go between two steps. When a request's iterator is closed before its end, as it is when its client
    is gone, its chains are taken out of the engine before the next step.

    Attributes:
        failure: what ended the thread; every request fails with it from then on.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.threads = torch.get_num_threads()
        self.failure: BaseException | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._run, name="chains", daemon=True).start()

    @property
    def open_requests(self) -> int:
        """Requests whose chains have not all ended."""
        return len(self._listeners)

    async def sample(
        self, prompt: list[int], *, chains: int, budget: int, temperature: float, excluded: list[int], seed: int | None
    ) -> AsyncGenerator[ChainTokens]:
        """Tokens of all chains as they come. `excluded` are item rows, `budget` tokens as for a whole response.

        Raises ValueError for a request that the constraint refuses, and RuntimeError when the engine has failed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[ChainTokens | BaseException]()
        name = str(next(self._numbers))
        parameters = SamplingParams(
            n=chains, temperature=temperature, max_tokens=budget, seed=seed, detokenize=False,
            stop_token_ids=[self.engine.constraint.tokens.answer_open], output_kind=RequestOutputKind.DELTA,
            extra_args={
                "gream": {"mode": "reasoning", "index_version": self.engine.index_version, "excluded": excluded}
            },
        )  # fmt: skip

        def hand_over(news: ChainTokens | BaseException) -> None:
            if not loop.is_closed():  # then nobody listens, and the removal is on its way
                loop.call_soon_threadsafe(arrived.put_nowait, news)

        self._calls.put(lambda: self._add(name, prompt, parameters, hand_over))
        ended = 0
        try:
            while ended < chains:
                news = await arrived.get()
                if isinstance(news, ValueError):
                    raise news
                if isinstance(news, BaseException):
                    raise RuntimeError(f"the engine of the chains has failed: {news}") from news
                ended += news.ended
                yield news
        finally:
            if ended < chains:
                self._calls.put(lambda: self._remove(name))

    def _add(self, name: str, prompt: list[int], parameters: Any, hand_over: Callable[..., None]) -> None:
        try:
            self.engine.constraint.start(
                ["reasoning"], [parameters.max_tokens], [parameters.extra_args["gream"]["excluded"]]
            )
            engine_id = self.engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        except ValueError as error:  # what this request asks for, not the engine
            hand_over(error)
            return
        self._listeners[name] = Listener(hand_over, engine_id)

    def _remove(self, name: str) -> None:
        listener = self._listeners.pop(name, None)
        if listener is not None:
            # By our own name vLLM would abort the chains alone, and not the request that stands for them all.
            self.engine.llm.llm_engine.abort_request([listener.engine_id], internal=True)

    def _run(self) -> None:
        # Every thread has a number of OpenMP threads of its own, and vLLM's attention takes only the engine's.
        torch.set_num_threads(self.threads)
        try:
            while True:
                self._take_calls()
                self._step()
        except BaseException as error:
            logger.exception("the engine of the chains has failed")
            self.failure = error
            while True:  # whoever comes is told, until the replica is replaced
                for listener in self._listeners.values():
                    listener.hand_over(error)
                self._listeners.clear()
                self._calls.get()()

    def _take_calls(self) -> None:
        """Do what was asked for since the last step; without open chains wait until something is."""
        if not self._listeners:
            self._calls.get()()
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            call()

    def _step(self) -> None:
        if not self._listeners:
            return
        for output in self.engine.llm.llm_engine.step():
            listener = self._listeners.get(output.request_id)
            if listener is None:
                continue
            chains: Any = output.outputs
            for chain in chains:
                ended = chain.finish_reason is not None
                listener.hand_over(ChainTokens(chain.index, tuple(chain.token_ids), ended))
            if output.finished:
                del self._listeners[output.request_id]
