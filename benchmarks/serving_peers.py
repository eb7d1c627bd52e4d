"""A peer of the service: transformers' constrained beam search behind FastAPI, with micro-batching.

    python -m benchmarks.serving_peers MODEL INDEX PORT

`POST /recommend` with a prompt's tokens gives item rows, -1 where a place holds no item. Requests that come while a
batch is computed go into the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

import numpy as np
import typer
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.beam_subjects import Task, hugging_face
from item_index.ragged import RaggedArray

WAIT_SECONDS = 0.002
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class PromptBody(BaseModel):
    tokens: list[int]


class MicroBatches:
    """Batches of at most `size` requests, each ranked in a thread."""

    def __init__(self, rank: Callable[[RaggedArray], np.ndarray], size: int) -> None:
        self.rank, self.size = rank, size
        self.waiting: asyncio.Queue[tuple[list[int], asyncio.Future[list[int]]]] = asyncio.Queue()

    async def ranked(self, tokens: list[int]) -> list[int]:
        """Item rows after a prompt."""
        answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        await self.waiting.put((tokens, answer))
        return await answer

    async def run(self) -> None:
        """Rank what waits, batch after batch."""
        while True:
            batch = [await self.waiting.get()]
            await asyncio.sleep(WAIT_SECONDS)
            while len(batch) < self.size and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            prompts = RaggedArray.of([tokens for tokens, _ in batch], np.int32)
            rows = await asyncio.to_thread(self.rank, prompts)
            for (_, answer), items in zip(batch, rows, strict=True):
                if not answer.cancelled():
                    answer.set_result(items.tolist())


def peer(batches: MicroBatches) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def running(_api: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batches.run())
        yield
        task.cancel()

    api = FastAPI(lifespan=running)

    @api.get("/health")
    async def health() -> str:
        return "ok"

    async def recommend(body: PromptBody) -> dict[str, list[int]]:
        return {"items": await batches.ranked(body.tokens)}

    recommend.__annotations__["body"] = PromptBody
    api.post("/recommend")(recommend)
    return api


@app.command()
def serve(
    model: str, index: str, port: int,
    width: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:  # fmt: skip
    """Serve transformers' constrained beam search."""
    rank = hugging_face(Task("Hugging Face, prefix function", model, index, "", "", width, batch, 1, threads))
    uvicorn.run(peer(MicroBatches(rank, batch)), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    app()
