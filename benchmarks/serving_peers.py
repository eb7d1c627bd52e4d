"""Peers of the service, each an HTTP server of its own: `python -m benchmarks.serving_peers NAME ...`.

    hugging_face  transformers' beam search with a prefix function, behind FastAPI, with micro-batching
    vllm          vLLM's OpenAI server; a request's regular expression names all items

Both are asked for the k best (or k sampled) items after the same prompts.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.beam_subjects import Task, hugging_face
from item_index.ragged import RaggedArray

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class PromptBody(BaseModel):
    """A prompt's token ids."""

    tokens: list[int]


@dataclass
class MicroBatches:
    """Requests that wait while a batch is computed go into the next one, at most `size` of them."""

    rank: Any
    size: int
    wait_seconds: float

    def __post_init__(self) -> None:
        self.waiting: asyncio.Queue[tuple[list[int], asyncio.Future]] = asyncio.Queue()

    async def ranked(self, tokens: list[int]) -> list[int]:
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        await self.waiting.put((tokens, answer))
        return await answer

    async def run(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            await asyncio.sleep(self.wait_seconds)
            while len(batch) < self.size and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            prompts = RaggedArray.of([tokens for tokens, _ in batch], np.int32)
            rows = await asyncio.to_thread(self.rank, prompts)
            for (_, answer), items in zip(batch, rows, strict=True):
                if not answer.cancelled():
                    answer.set_result(items.tolist())


@app.command()
def serve_hugging_face(
    model: str, index: str, port: int,
    width: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:  # fmt: skip
    """Serve transformers' constrained beam search."""
    rank = hugging_face(Task("Hugging Face, prefix function", model, index, "", "", width, batch, 1, threads))
    batches = MicroBatches(rank, batch, 0.002)
    api = FastAPI()

    @api.on_event("startup")
    async def start() -> None:
        api.state.task = asyncio.create_task(batches.run())

    @api.get("/readyz")
    async def ready() -> str:
        return "ok"

    @api.post("/recommend")
    async def recommend(body: PromptBody) -> dict[str, list[int]]:
        return {"items": await batches.ranked(body.tokens)}

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    sys.exit(app())
