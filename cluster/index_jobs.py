"""The index stage's work on a cluster, as Ray Data jobs: embedding, endpoint calls, codes of new items.

Each job gives what the same work in one process gives, in the same order. Workers read the encoder, the cache and the
blocks by path, so the run folder has to be on a file system that all nodes share.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from cluster.placement import DeadlineExceeded
from cluster.progress import progress_bar
from cluster.settings import ClusterSettings
from item_index.catalogue import Catalogue
from item_index.embedding import BLOCK_ITEMS, load_encoder
from item_index.fusion import Endpoint, ask_endpoint
from item_index.input_error import InputError
from item_index.quantizer import ResidualKMeans
from item_index.vectors import ID_FIELD, VECTOR_FIELD, iterate_vectors, write_vectors

# Questions of one call of a worker; its last requests leave some of the concurrency idle.
QUESTIONS = 512
POLL_SECONDS = 0.2


def embed(items: Catalogue, encoder_folder: Path, vectors_file: Path, cluster: ClusterSettings) -> None:
    """Encode all items by workers that load the saved encoder, and write `vectors_file` like `write_vectors`.

    Neural encoders round differently in batches of another make-up, so blocks are cut as in one process. Raises
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
        dataset = _dataset(blocks(), Path(work)).map_batches(
            _EncoderWorker, fn_constructor_args=(str(encoder_folder.resolve()),), batch_size=BLOCK_ITEMS,
            batch_format="pyarrow", concurrency=cluster.index_workers, num_cpus=cluster.index_worker_cpus,
            num_gpus=cluster.index_worker_gpus,
        )  # fmt: skip
        parts = _run(dataset, Path(work), "embedding", -(-len(items) // BLOCK_ITEMS), None, cluster)
        write_vectors(
            vectors_file,
            ((table[ID_FIELD].to_pylist(), _matrix(table[VECTOR_FIELD])) for table in _in_order(parts, items.item_ids)),
        )


def ask_by_workers(
    endpoint: Endpoint, questions: Iterable[tuple[str, str]], cache: Path, cluster: ClusterSettings
) -> dict[str, str]:
    """Ask all (key, prompt) pairs by workers that share out `endpoint.concurrency`; see `ask_endpoint`.

    The answers are in the cache folder, one file per call of a worker, so a job that is killed loses only requests
    under way. Raises InputError that a worker raised, and DeadlineExceeded when for `cluster.call_seconds` no answer
    comes in.
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
        source = _dataset(blocks, Path(work))
        dataset = source.map_batches(
            _AskingWorker, fn_constructor_args=((shared,), str(cache.resolve()), cluster.start_seconds),
            batch_size=QUESTIONS, batch_format="pyarrow", concurrency=workers, num_cpus=cluster.index_worker_cpus,
        )  # fmt: skip
        parts = _run(dataset, Path(work), "fusion", len(list((Path(work) / "in").iterdir())), cache, cluster)
        tables = [pq.read_table(part) for part in parts]
        return {
            key: problem
            for table in tables
            for key, problem in zip(table["key"].to_pylist(), table["problem"].to_pylist(), strict=True)
            if problem
        }


def encode_newcomers(vectors_file: Path, codebooks: Sequence[np.ndarray], cluster: ClusterSettings) -> np.ndarray:
    """int32 [items, H]: nearest centroids level by level, like `ResidualKMeans.encode`, of all vectors in a file.

    Args:
        vectors_file: as `write_vectors` writes it, of the width of the codebooks.
        codebooks: per level, float32 [K_l, D]; they reach the workers through the object store.
        cluster: number of workers, their CPUs, deadlines.
    """
    item_ids: list[str | int] = []

    def blocks() -> Iterator[pa.Table]:
        for ids, vectors in iterate_vectors(vectors_file, rows=BLOCK_ITEMS):
            item_ids.extend(ids)
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            yield pa.table({ID_FIELD: pa.array(ids), VECTOR_FIELD: column})

    shared = ray.put(list(codebooks))
    with tempfile.TemporaryDirectory(dir=vectors_file.parent, prefix="encoding-", ignore_cleanup_errors=True) as work:
        dataset = _dataset(blocks(), Path(work)).map_batches(
            _QuantizerWorker, fn_constructor_args=((shared,), cluster.start_seconds), batch_size=BLOCK_ITEMS,
            batch_format="pyarrow", concurrency=cluster.index_workers, num_cpus=cluster.index_worker_cpus,
        )  # fmt: skip
        parts = _run(dataset, Path(work), "encoding", -(-len(item_ids) // BLOCK_ITEMS), None, cluster)
        return np.concatenate([_matrix(table["codes"]) for table in _in_order(parts, item_ids)])


class _EncoderWorker:
    def __init__(self, encoder_folder: str) -> None:
        self._encoder = load_encoder(encoder_folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns = {name: tuple(batch[name].to_pylist()) for name in batch.column_names}
        vectors = self._encoder.encode(
            Catalogue(
                item_ids=columns[ID_FIELD], titles=columns["title"], descriptions=columns["description"],
                categories=tuple(tuple(names) for names in columns["categories"]), brands=columns["brand"],
            )
        )  # fmt: skip
        return pa.table({ID_FIELD: batch[ID_FIELD], VECTOR_FIELD: _lists(vectors)})


class _AskingWorker:
    def __init__(self, endpoint: tuple[ray.ObjectRef], cache: str, seconds: float) -> None:
        self._endpoint: Endpoint = ray.get(endpoint[0], timeout=seconds)
        self._cache = Path(cache)

    def __call__(self, batch: pa.Table) -> pa.Table:
        keys = batch["key"].to_pylist()
        questions = zip(keys, batch["prompt"].to_pylist(), strict=True)
        problems = ask_endpoint(self._endpoint, questions, self._cache, lambda: None)
        return pa.table({"key": keys, "problem": [problems.get(key, "") for key in keys]})


class _QuantizerWorker:
    def __init__(self, codebooks: tuple[ray.ObjectRef], seconds: float) -> None:
        books = tuple(ray.get(codebooks[0], timeout=seconds))
        self._quantizer = ResidualKMeans(books, np.zeros((0, len(books)), dtype=np.int32), ())

    def __call__(self, batch: pa.Table) -> pa.Table:
        codes = self._quantizer.encode(_matrix(batch[VECTOR_FIELD]))
        return pa.table({ID_FIELD: batch[ID_FIELD], "codes": _lists(codes)})


def _dataset(blocks: Iterable[pa.Table], work: Path) -> ray.data.Dataset:
    """The blocks, one Parquet file and one read task each, so that batches of the block's size are the blocks."""
    (work / "in").mkdir()
    paths = []
    for number, block in enumerate(blocks):
        paths.append(str(work / "in" / f"{number:08}.parquet"))
        pq.write_table(block, paths[-1])
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):  # a dataset keeps the context that it was made under
        return ray.data.read_parquet(paths, override_num_blocks=len(paths))


def _run(
    dataset: ray.data.Dataset, work: Path, name: str, blocks: int, watched: Path | None, cluster: ClusterSettings
) -> list[Path]:
    """Execute the job into `work/out`; the files that it wrote, in order.

    What is waited for is growth, of the output or of the folder `watched`: a job may take days, but not stand still.
    """
    output = work / "out"
    failure: list[BaseException] = []

    def write() -> None:
        try:
            dataset.write_parquet(str(output))
        except BaseException as error:
            failure.append(error)

    # Ray Data has no deadline of its own. A daemon does not keep the process alive when it runs out.
    thread = threading.Thread(target=write, daemon=True, name=f"{name} job")
    thread.start()
    size, grown_at, done = -1, time.monotonic(), 0
    with progress_bar(name, blocks) as bar:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            files = list(output.rglob("*.parquet")) if output.is_dir() else []
            bar.advance(len(files) - done)
            done = len(files)
            now = sum(file.stat().st_size for file in (watched.glob("*.jsonl") if watched else files))
            if now != size:
                size, grown_at = now, time.monotonic()
            if time.monotonic() - grown_at > cluster.call_seconds:
                raise DeadlineExceeded(
                    f"the {name} job has made no progress for {cluster.call_seconds:.0f} s; look at the workers' logs "
                    "in Ray's session folder, or raise cluster.call_seconds"
                )
        bar.advance(blocks - done)
    if failure:
        _raise_input_error(failure[0])
        raise failure[0]
    return sorted(output.rglob("*.parquet"))


def _raise_input_error(error: BaseException) -> None:
    """Ray wraps what a worker raises; the user's own mistake is to read like one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InputError):
            raise InputError(
                seen.problem, file=seen.file, row=seen.row, field=seen.field, remedy=seen.remedy
            ) from error
        seen = getattr(seen, "cause", None) or seen.__cause__


def _in_order(parts: Sequence[Path], item_ids: Sequence[str | int]) -> Iterator[pa.Table]:
    """The tables of the parts; raises RuntimeError where their items are not `item_ids` in that order."""
    read = 0
    for part in parts:
        table = pq.read_table(part)
        if tuple(table[ID_FIELD].to_pylist()) != tuple(item_ids[read : read + table.num_rows]):
            raise RuntimeError(f"{part.name} does not hold the items from row {read} on")
        yield table
        read += table.num_rows
    if read != len(item_ids):
        raise RuntimeError(f"the job gave {read} rows for {len(item_ids)} items")


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), -1)
