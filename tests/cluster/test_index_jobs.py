"""The Ray Data jobs give what the same work in one process gives, in the same order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from chat_server import ChatServer, describe

from cluster import index_jobs
from cluster.placement import DeadlineExceeded
from cluster.settings import ClusterSettings
from item_index.catalogue import Catalogue, Review
from item_index.chat_endpoint import Endpoint, ask_endpoint
from item_index.embedding import Encoder, LanguageModelEncoder, TfIdfEncoder, encoded_blocks
from item_index.fusion import FAILED, FUSED, INSTRUCTION, FusedText, fuse_descriptions
from item_index.input_error import InputError
from item_index.quantizer import ResidualKMeans
from item_index.vectors import read_vectors, write_vectors

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_cluster")]
WORDS = ["drama", "steady", "evidence", "more", "mostly", "intent", "history", "Ünïcode"]
# Two actors on two CPUs: all of them are taken.
CLUSTER = ClusterSettings(index_workers=2, call_seconds=200)
# A worker takes seconds to start, so there is one where it is not about sharing work out.
ONE_WORKER = ClusterSettings(index_workers=1, call_seconds=200)


def items_of(count: int) -> Catalogue:
    """Texts of very different lengths, ids in no order."""
    generator = np.random.default_rng(0)
    return Catalogue(
        item_ids=tuple(f"item-{row}" for row in generator.permutation(count)),
        titles=tuple(f"Tale {row}" for row in range(count)),
        descriptions=tuple(" ".join(generator.choice(WORDS, row % 40)) for row in range(count)),
        categories=tuple(tuple(generator.choice(WORDS, row % 3)) for row in range(count)),
        brands=tuple("" if row % 2 else "Acme" for row in range(count)),
        reviews=((Review(1, "I could read this again and again."),),) * count,
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few items, so that a small catalogue has several, the last one shorter."""
    monkeypatch.setattr(index_jobs, "BLOCK_ITEMS", 16)
    monkeypatch.setattr("item_index.embedding.BLOCK_ITEMS", 16)
    monkeypatch.setattr(index_jobs, "QUESTIONS", 3)


def expect_the_same_vectors(encoder: Encoder, items: Catalogue, folder: Path, cluster: ClusterSettings) -> None:
    encoder.save(folder / "encoder")
    write_vectors(folder / "alone.parquet", encoded_blocks(encoder, items))
    index_jobs.embed(items, folder / "encoder", folder / "jobs.parquet", cluster)
    alone, jobs = (read_vectors(folder / name) for name in ("alone.parquet", "jobs.parquet"))
    assert jobs[0] == alone[0] == list(items.item_ids)
    np.testing.assert_array_equal(jobs[1], alone[1])
    assert {path.name for path in folder.iterdir()} == {"encoder", "alone.parquet", "jobs.parquet"}


def test_embedding_words_by_workers_is_embedding_them_in_one_process(small_blocks, tmp_path: Path) -> None:
    items = items_of(75)
    expect_the_same_vectors(TfIdfEncoder.fit(items, dimensions=6, seed=0), items, tmp_path, CLUSTER)


def test_embedding_by_a_language_model_is_the_same_too(small_blocks, tiny, tmp_path: Path) -> None:
    encoder = LanguageModelEncoder(tiny.checkpoint, batch_tokens=300)
    expect_the_same_vectors(encoder, items_of(40), tmp_path, ONE_WORKER)


def test_new_items_get_the_codes_that_one_process_gives(small_blocks, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    quantizer = ResidualKMeans.fit(generator.normal(size=(60, 4)).astype(np.float32), (6, 4, 3), seed=0)
    newcomers = generator.normal(size=(37, 4)).astype(np.float32)
    write_vectors(tmp_path / "new.parquet", [([f"new-{row}" for row in range(37)], newcomers)])
    codes = index_jobs.encode_newcomers(tmp_path / "new.parquet", quantizer.codebooks, ONE_WORKER)
    assert codes.dtype == np.int32
    assert codes.shape == (37, 3)
    np.testing.assert_array_equal(codes, quantizer.encode(newcomers))


def fused(endpoint: Endpoint, cache: Path, *, by_workers: bool, cluster: ClusterSettings = CLUSTER) -> FusedText:
    def ask(questions, _, folder):
        if by_workers:
            return index_jobs.ask_by_workers(endpoint, questions, folder, cluster, name="fusion")
        return ask_endpoint(endpoint, questions, folder, lambda: None)

    return fuse_descriptions(
        items_of(11), trains_on=lambda user, row: row != 4, key_of=endpoint.cache_key, cache=cache, ask=ask
    )


def endpoint_of(server: ChatServer, **limits) -> Endpoint:
    return Endpoint(server.url, "scribe", "s3cret", INSTRUCTION, "index.fusion", **{"retries": 0, **limits})


def test_a_job_that_stands_still_ends_at_its_deadline(small_blocks, tmp_path: Path) -> None:
    with ChatServer(lambda *_: 600.0) as server:
        endpoint = endpoint_of(server, deadline_seconds=5.0)
        # What Ray Data has under way goes on for a while in this process, which lives on here: it may take no CPUs.
        short = CLUSTER.model_copy(update={"call_seconds": 1.0, "index_worker_cpus": 0.0})
        with pytest.raises(DeadlineExceeded, match="the fusion job has made no progress for 1 s"):
            fused(endpoint, tmp_path, by_workers=True, cluster=short)


def test_asking_by_workers_is_asking_in_one_process(small_blocks, tmp_path: Path) -> None:
    def behaviour(title: str, number: int):
        return web.Response(status=400, text="no") if title == "Tale 7" else describe(title, number)

    with ChatServer(behaviour) as server:
        endpoint = endpoint_of(server, concurrency=2)
        alone = fused(endpoint, tmp_path / "alone", by_workers=False)
        server.bodies.clear()
        jobs = fused(endpoint, tmp_path / "jobs", by_workers=True)
        assert jobs == alone
        assert jobs.counts[FUSED] == 9
        assert jobs.sources[7] == FAILED
        assert server.asked == {f"Tale {row}": 1 for row in range(11) if row != 4}
        assert server.most_at_once <= 2, "the workers share out the concurrency"
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}
        assert all(path.suffix == ".jsonl" for path in (tmp_path / "jobs").iterdir())


def test_what_a_worker_says_of_bad_input_reads_as_it_would_in_one_process(small_blocks, tmp_path: Path) -> None:
    with ChatServer(lambda *_: web.Response(status=401, text="who are you")) as server:
        endpoint = endpoint_of(server, concurrency=2)
        messages = []
        for by_workers in (False, True):
            with pytest.raises(InputError, match="refuses every request") as caught:
                fused(endpoint, tmp_path / str(by_workers), by_workers=by_workers, cluster=ONE_WORKER)
            messages.append(str(caught.value))
    assert messages[0] == messages[1]
