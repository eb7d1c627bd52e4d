"""Work on a cluster as Ray Data jobs: embedding, endpoint calls, codes of new items.

Each job gives what the same work in one process gives, in the same order. The driver cuts the work into numbered block
files; the dataset holds their paths, and an actor of the pool reads one block and writes the file of the same number.
Ray Data's own `read_parquet` is not used: it packs small files into one task and reads them with several threads, so
that batches are cut elsewhere than in one process, and rows come back in another order even with `preserve_order`.

Workers open blocks, encoder and cache by path, so the run folder has to be on a file system that all nodes share.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from cluster.placement import DeadlineExceeded, run_watched
from cluster.progress import progress_bar
from cluster.settings import ClusterSettings
from item_index.answer_cache import AskingReport, Failure
from item_index.catalogue import Catalogue
from item_index.embedding import BLOCK_ITEMS, load_encoder
from item_index.input_error import InputError
from item_index.quantizer import ResidualKMeans
from item_index.vectors import ID_FIELD, VECTOR_FIELD, iterate_vectors, write_vectors

if TYPE_CHECKING:
    from item_index.chat_endpoint import Endpoint

# Questions of one block; the last requests of a block leave some of the concurrency idle.
QUESTIONS = 512


def embed(items: Catalogue, encoder_folder: Path, vectors_file: Path, cluster: ClusterSettings) -> None:
    """Encode all items by workers that load the saved encoder, and write `vectors_file` as `write_vectors` does.

    A neural encoder rounds differently in batches of another make-up, so blocks are cut as in one process. Raises
    InputError that a worker raised, and DeadlineExceeded when no block is finished within `cluster.call_seconds`.
    """

    def blocks() -> Iterator[pa.Table]:
        for start in range(0, len(items), BLOCK_ITEMS):
            rows = slice(start, start + BLOCK_ITEMS)
            yield pa.table(
                {
                    ID_FIELD: pa.array(items.item_ids[rows]),
                    "title": pa.array(items.titles[rows], pa.string()),
                    "description": pa.array(items.descriptions[rows], pa.string()),
                    "categories": pa.array(items.categories[rows], pa.list_(pa.string())),
                    "brand": pa.array(items.brands[rows], pa.string()),
                }
            )

    with tempfile.TemporaryDirectory(dir=vectors_file.parent, prefix="embedding-", ignore_cleanup_errors=True) as work:
        parts = _run(
            "embedding", blocks(), Path(work), _EncoderWorker, (str(encoder_folder.resolve()),), cluster,
            workers=cluster.index_workers, gpus=cluster.index_worker_gpus,
        )  # fmt: skip
        tables = (pq.read_table(part) for part in parts)
        write_vectors(vectors_file, ((table[ID_FIELD].to_pylist(), _matrix(table[VECTOR_FIELD])) for table in tables))


def ask_by_workers(
    endpoint: Endpoint, questions: Iterable[tuple[str, str]], cache: Path, cluster: ClusterSettings, *, name: str
) -> AskingReport:
    """Ask all (key, prompt) pairs by workers that share out `endpoint.concurrency`; see `ask_endpoint`.

    The answers are in the cache folder as they come, so a job that is killed loses only requests under way. Raises
    InputError that a worker raised, and DeadlineExceeded when no answer comes in for `cluster.call_seconds`.
    """
    workers = min(cluster.index_workers, endpoint.concurrency)
    # By reference: Ray Data shows the arguments of its operators in the dashboard, and the endpoint holds the key.
    shared = ray.put(replace(endpoint, concurrency=endpoint.concurrency // workers))
    cache.mkdir(parents=True, exist_ok=True)
    waiting = iter(questions)
    batches = iter(lambda: list(itertools.islice(waiting, QUESTIONS)), [])
    blocks = (
        pa.table({"key": [key for key, _ in batch], "prompt": [prompt for _, prompt in batch]}) for batch in batches
    )
    with tempfile.TemporaryDirectory(dir=cache, prefix="questions-", ignore_cleanup_errors=True) as work:
        parts = _run(
            name, blocks, Path(work), _AskingWorker, ([shared], str(cache.resolve()), cluster.start_seconds),
            cluster, workers=workers, watched=cache,
        )  # fmt: skip
        reports = [json.loads(pq.read_table(part)["report"][0].as_py()) for part in parts]
    failures = [{key: Failure(**failure) for key, failure in report.pop("failures").items()} for report in reports]
    return sum((AskingReport(failed, **rest) for failed, rest in zip(failures, reports, strict=True)), AskingReport())


def encode_newcomers(
    vectors_file: Path, codebooks: Sequence[np.ndarray], cluster: ClusterSettings, *, device: str = "cpu"
) -> np.ndarray:
    """int32 [items, H]: the nearest centroid level by level of every vector in a file, as `ResidualKMeans.encode`.

    Args:
        vectors_file: as `write_vectors` writes it, of the width of the codebooks.
        codebooks: per level, float32 [K_l, D]; they reach the workers through the object store.
        cluster: number of workers, their CPUs and, where the device is not the CPU, GPUs; deadlines.
        device: of the distances.
    """

    def blocks() -> Iterator[pa.Table]:
        for ids, vectors in iterate_vectors(vectors_file, rows=BLOCK_ITEMS):
            yield pa.table({ID_FIELD: pa.array(ids), VECTOR_FIELD: _lists(vectors)})

    shared = ray.put(list(codebooks))
    with tempfile.TemporaryDirectory(dir=vectors_file.parent, prefix="encoding-", ignore_cleanup_errors=True) as work:
        parts = _run(
            "encoding", blocks(), Path(work), _QuantizerWorker, ([shared], device, cluster.start_seconds), cluster,
            workers=cluster.index_workers, gpus=0 if device == "cpu" else cluster.index_worker_gpus,
        )  # fmt: skip
        return np.concatenate([_matrix(pq.read_table(part)["codes"]) for part in parts])


class _BlockWorker:
    """Reads the block that a path names and writes the result under `out`, whole or not at all."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for path in map(Path, batch["path"]):
            result = path.parents[1] / "out" / path.name
            unfinished = result.with_suffix(f".{os.getpid()}")
            try:
                pq.write_table(self.work(pq.read_table(path)), unfinished)
            except InputError as error:  # Ray Data hands on the text of an exception, and not the exception
                unfinished.write_text(json.dumps(vars(error)), encoding="utf-8")
                os.replace(unfinished, result.with_suffix(".failure"))
                raise
            os.replace(unfinished, result)
        return batch

    def work(self, block: pa.Table) -> pa.Table:
        raise NotImplementedError


class _EncoderWorker(_BlockWorker):
    def __init__(self, encoder_folder: str) -> None:
        self._encoder = load_encoder(encoder_folder)

    def work(self, block: pa.Table) -> pa.Table:
        columns = {name: tuple(block[name].to_pylist()) for name in block.column_names}
        items = Catalogue(
            item_ids=columns[ID_FIELD], titles=columns["title"], descriptions=columns["description"],
            categories=tuple(tuple(names) for names in columns["categories"]), brands=columns["brand"],
        )  # fmt: skip
        return pa.table({ID_FIELD: block[ID_FIELD], VECTOR_FIELD: _lists(self._encoder.encode(items))})


class _AskingWorker(_BlockWorker):
    def __init__(self, endpoint: list[ray.ObjectRef], cache: str, seconds: float) -> None:
        self._endpoint: Endpoint = ray.get(endpoint[0], timeout=seconds)
        self._cache = Path(cache)

    def work(self, block: pa.Table) -> pa.Table:
        from item_index.chat_endpoint import ask_endpoint  # takes seconds, and only this worker asks

        questions = zip(block["key"].to_pylist(), block["prompt"].to_pylist(), strict=True)
        report = ask_endpoint(self._endpoint, questions, self._cache, lambda: None)
        return pa.table({"report": [json.dumps(asdict(report))]})


class _QuantizerWorker(_BlockWorker):
    def __init__(self, codebooks: list[ray.ObjectRef], device: str, seconds: float) -> None:
        self._device = device
        books = tuple(ray.get(codebooks[0], timeout=seconds))
        self._quantizer = ResidualKMeans(books, np.zeros((0, len(books)), dtype=np.int32), ())

    def work(self, block: pa.Table) -> pa.Table:
        return pa.table({"codes": _lists(self._quantizer.encode(_matrix(block[VECTOR_FIELD]), device=self._device))})


def _run(
    name: str, blocks: Iterable[pa.Table], work: Path, worker: type[_BlockWorker], arguments: tuple[Any, ...],
    cluster: ClusterSettings, *, workers: int, gpus: float = 0, watched: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Put every block through one of the workers; the result files, in the order of the blocks.

    What is waited for is growth, of the results or of the JSON lines in `watched`.
    """
    (work / "in").mkdir()
    (work / "out").mkdir()
    paths = []
    for number, block in enumerate(blocks):
        paths.append(work / "in" / f"{number:08}.parquet")
        pq.write_table(block, paths[-1])
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # there is one of our own
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with ray.data.DataContext.current(context):  # a dataset keeps the context that it was made under
        dataset = ray.data.from_items(
            [{"path": str(path.resolve())} for path in paths], override_num_blocks=len(paths)
        ).map_batches(
            worker, fn_constructor_args=arguments, batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(paths))), num_cpus=cluster.index_worker_cpus,
            num_gpus=gpus,
        )  # fmt: skip
    size, done = -1, 0

    def progressed() -> bool:
        nonlocal size, done
        results = sum(1 for _ in (work / "out").glob("*.parquet"))
        bar.advance(results - done)
        before, done = size, results
        size = results + sum(file.stat().st_size for file in (watched.glob("*.jsonl") if watched else ()))
        return size != before

    with progress_bar(name, len(paths)) as bar:
        try:
            run_watched(name, dataset.materialize, progressed, cluster.call_seconds)
        except DeadlineExceeded:
            raise
        except BaseException as error:
            for file in (work / "out").glob("*.failure"):
                raise InputError(**json.loads(file.read_text(encoding="utf-8"))) from error
            raise
    return [work / "out" / path.name for path in paths]


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), -1)
