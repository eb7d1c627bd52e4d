"""The replicas that recommend: direct mode by beam search, reasoning mode by chains of vLLM and a beam after each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ray.util.metrics import Counter, Gauge, Histogram
from tokenizers.decoders import DecodeStream

from actors.chain_streams import ChainStreams
from actors.ranking import RankingWorker
from actors.request_batches import RequestBatches
from actors.rollout import RolloutEngine
from actors.served_run import Query, ServedRun, UnknownId
from evaluation.ranking import merge_chains
from item_index.constraint import Mode
from item_index.ragged import RaggedArray
from rewards.chains import semantic_ids_in

MILLISECONDS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


@dataclass(frozen=True)
class ReplicaPlan:
    """What every replica is made of; folders must be there on its node.

    Attributes:
        run_folder: with the index and the corpus.
        checkpoint: of the model.
        versions: that these folders hold; a replica that finds others does not start.
        beam_width: of all beam searches, and the length of the longest list.
        batch_users, batch_wait_seconds: requests of one beam search at most, and how long it waits for them.
        reasoning_budget: tokens of chain and answer.
        sequences: chains that are decoded at once.
    """

    run_folder: str
    checkpoint: str
    versions: dict[str, str]
    beam_width: int
    batch_users: int
    batch_wait_seconds: float
    reasoning_budget: int
    sequences: int
    threads: int
    dtype: Literal["float32", "bfloat16"]
    kv_cache_mib: int


class BatchedRanking:
    """Beam searches of concurrent requests, put together; a batch runs in a thread while the next one gathers."""

    def __init__(self, plan: ReplicaPlan, mode: Mode) -> None:
        index = str(Path(plan.run_folder) / "index")
        self.worker = RankingWorker(plan.checkpoint, index, threads=plan.threads)
        self.mode, self.width = mode, plan.beam_width
        self.batch_sizes = Histogram(
            "gream_serving_batch_users", description="Requests of one beam search.",
            boundaries=[1, 2, 4, 8, 16, 32, 64, 128], tag_keys=("mode",),
        )  # fmt: skip
        self.items = Counter(
            "gream_serving_items", description="Items asked for, by whether there were so many.",
            tag_keys=("mode", "given"),
        )  # fmt: skip
        self.batches = RequestBatches(self._search, most=plan.batch_users, wait_seconds=plan.batch_wait_seconds)

    async def rank(self, context: Sequence[int], excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items int32 [K] and log-probabilities float32 [K] after a context, without the excluded rows."""
        return await self.batches.result((context, excluded))

    async def _search(self, opened: list[tuple[Sequence[int], np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        self.batch_sizes.observe(len(opened), tags={"mode": self.mode})
        contexts = RaggedArray.of([context for context, _ in opened], np.int32)
        excluded = RaggedArray.of([rows for _, rows in opened], np.int32)
        items, scores = await asyncio.to_thread(self.worker.rank, contexts, excluded, mode=self.mode, width=self.width)
        return list(zip(items, scores, strict=True))

    def listed(self, run: ServedRun, items_K: np.ndarray, scores_K: np.ndarray, k: int) -> list[dict[str, Any]]:
        """The first k of a ranked list, counted."""
        items = run.ranked(items_K, scores_K, k)
        self.items.inc(len(items), tags={"mode": self.mode, "given": "yes"})
        if len(items) < k:
            self.items.inc(k - len(items), tags={"mode": self.mode, "given": "no"})
        return items


class DirectRecommender:
    """Recommends at once; also looks up items and users for the page, which needs no model."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self.ranking = BatchedRanking(plan, "direct")
        self.run = served_run(plan, self.ranking)

    async def recommend(self, queries: Sequence[Query]) -> list[dict[str, Any] | UnknownId]:
        """For each query `items`, best first, and the `versions` they come from; or why it has none."""
        return await asyncio.gather(*(self._recommended(query) for query in queries))

    async def _recommended(self, query: Query) -> dict[str, Any] | UnknownId:
        try:
            history = self.run.history_of(query)
            excluded = self.run.excluded_by(query, history)
        except UnknownId as error:
            return error  # raised, it would be an answer to all of the queries
        prompt = self.run.builder.prompt(history, "direct")
        if len(excluded) >= len(self.run.catalogue):
            return {"items": [], "versions": self.run.versions}
        items_K, scores_K = await self.ranking.rank(prompt, excluded)
        return {"items": self.ranking.listed(self.run, items_K, scores_K, query.k), "versions": self.run.versions}

    async def versions(self) -> dict[str, str]:
        """Which checkpoint and index answer here."""
        return self.run.versions

    async def item(self, item_id: str | int) -> dict[str, Any]:
        """An item of the catalogue. Raises UnknownId."""
        return self.run.item(self.run.row(item_id)) | {"versions": self.run.versions}

    async def search(self, words: str, limit: int) -> list[dict[str, Any]]:
        """Items by words of their titles."""
        return self.run.search(words, limit)

    async def users(self, beginning: str, limit: int) -> list[str | int]:
        """Users by the beginning of their ids."""
        return self.run.users(beginning, limit)

    async def history(self, user_id: str | int, limit: int) -> list[dict[str, Any]]:
        """The latest items of a user, the oldest first. Raises UnknownId."""
        history = self.run.history_of(Query("direct", 1, user_id=user_id))
        return [self.run.item(int(row)) for row in history[-limit:]]


class ReasoningRecommender:
    """Recommends after chains of reasoning, which can be read while they are written."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self.plan = plan
        self.ranking = BatchedRanking(plan, "reasoning")
        self.run = served_run(plan, self.ranking)
        self.engine = RolloutEngine(
            plan.checkpoint, str(Path(plan.run_folder) / "index"), dtype=plan.dtype, kv_cache_mib=plan.kv_cache_mib,
            sequences=plan.sequences, threads=plan.threads,
        )  # fmt: skip
        self.streams = ChainStreams(self.engine)
        self.tokens = Counter("gream_serving_chain_tokens", description="Tokens of reasoning chains.")
        self.writing = 0
        self.open_requests = Gauge("gream_serving_open_chains", description="Requests whose chains are being written.")

    async def versions(self) -> dict[str, str]:
        """Which checkpoint and index answer here."""
        return self.run.versions

    def check_health(self) -> None:
        """Asked by Serve, which replaces the replica when this raises."""
        if self.streams.failure is not None:
            raise RuntimeError(f"the engine of the chains has failed: {self.streams.failure}")

    async def recommend(self, query: Query) -> AsyncIterator[dict[str, Any]]:
        """The first chain's text as it is written, `{"text": ...}`, then what `DirectRecommender.recommend` gives for
        a query with the `chains` beside it. Raises UnknownId.

        An item's score is log (1/M) sum over the M chains of p(item | chain).
        """
        history = self.run.history_of(query)
        prompt, excluded = self.run.builder.prompt(history, "reasoning"), self.run.excluded_by(query, history)
        if len(excluded) >= len(self.run.catalogue):
            yield {"items": [], "chains": [], "versions": self.run.versions}
            return
        written: list[list[int]] = [[] for _ in range(query.chains)]
        reader, tokenizer = DecodeStream(skip_special_tokens=False), self.run.builder.tokenizer.backend_tokenizer
        streaming = self.streams.sample(
            prompt, chains=query.chains, budget=self.plan.reasoning_budget, temperature=query.temperature,
            excluded=excluded.tolist(), seed=query.seed,
        )  # fmt: skip
        self._count_writing(1)
        try:
            async for news in streaming:
                self.tokens.inc(len(news.tokens))
                written[news.chain] += news.tokens
                if news.chain == 0:
                    text = "".join(reader.step(tokenizer, token) or "" for token in news.tokens)
                    if text:
                        yield {"text": text}
        finally:
            self._count_writing(-1)
            await streaming.aclose()
        ranked = await asyncio.gather(*(self.ranking.rank([*prompt, *chain], excluded) for chain in written))
        items_CK, scores_CK = (np.stack(part) for part in zip(*ranked, strict=True))
        items, scores = merge_chains(
            items_CK, scores_CK, np.zeros(query.chains, np.int64), users=1, width=self.plan.beam_width
        )
        yield {
            "items": self.ranking.listed(self.run, items[0], scores[0], query.k),
            "chains": [self._chain(tokens) for tokens in written],
            "versions": self.run.versions,
        }

    def _count_writing(self, change: int) -> None:
        self.writing += change
        self.open_requests.set(self.writing)

    def _chain(self, tokens: list[int]) -> dict[str, Any]:
        """A chain in words, with titles in the place of semantic IDs, and its rewritten history."""
        special, decode = self.run.builder.tokens, self.run.builder.tokenizer.decode
        end, rows = tokens.index(special.think_close), self.run.index.row_of_codes
        mentioned = [rows[codes] for codes in semantic_ids_in(tokens[:end], special)]
        rewritten = [rows[codes] for codes in semantic_ids_in(tokens[end:], special)]
        return {
            "think": self.run.with_titles(decode(tokens[:end]), mentioned).strip(),
            "rewritten_history": [self.run.item(row) for row in rewritten],
        }


def served_run(plan: ReplicaPlan, ranking: BatchedRanking) -> ServedRun:
    """The run folder's catalogue side, with the tokenizer of the ranking's model."""
    worker = ranking.worker
    return ServedRun(
        plan.run_folder, plan.checkpoint, versions=plan.versions, tokenizer=worker.tokenizer,
        tokens=worker.constraint.tokens,
    )  # fmt: skip
