"""Item vectors as a Parquet file, written and read row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from item_index.input_error import InputError

ID_FIELD, VECTOR_FIELD = "item_id", "vector"
GROUP_ROWS = 16_384  # of one row group
_REMEDY = "Run the index stage anew."


def write_vectors(path: str | os.PathLike[str], blocks: Iterable[tuple[Sequence[str | int], np.ndarray]]) -> None:
    """Write item_id and vector (fixed-size list of float32), one row group per block.

    Args:
        path: file on a local or shared file system; it appears only when everything is written.
        blocks: (item ids, float [rows, D]) in the order of the items. One block at a time is in memory.

    Raises InputError that names the row and the item for a vector that is not finite, and ValueError for no blocks or
    blocks that do not fit together.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for item_ids, vectors in blocks:
            if vectors.ndim != 2 or len(vectors) != len(item_ids):
                raise ValueError(f"vectors of shape {vectors.shape} for {len(item_ids)} items")
            block = np.ascontiguousarray(vectors, dtype=np.float32)
            bad = first_row_not_finite(block)
            if bad is not None:
                raise InputError(
                    f"the vector of item {item_ids[bad]!r} holds a value that is not finite",
                    file=target,
                    row=rows + bad,
                    field=VECTOR_FIELD,
                    remedy="Check the encoder and the item's text.",
                )
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), block.shape[1])
            table = pa.table({ID_FIELD: pa.array(item_ids), VECTOR_FIELD: column})
            if writer is None:
                writer = pq.ParquetWriter(unfinished, table.schema)
            elif table.schema != writer.schema:
                raise ValueError(f"row {rows} begins a block of {table.schema}, and the file holds {writer.schema}")
            writer.write_table(table)
            rows += len(block)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise ValueError("there are no vectors to write")
    os.replace(unfinished, target)


def vector_blocks(
    item_ids: Sequence[str | int], vectors_ID: np.ndarray
) -> Iterator[tuple[Sequence[str | int], np.ndarray]]:
    """An array in memory as the blocks that `write_vectors` takes."""
    for start in range(0, len(vectors_ID), GROUP_ROWS):
        yield item_ids[start : start + GROUP_ROWS], vectors_ID[start : start + GROUP_ROWS]


def iterate_vectors(path: str | os.PathLike[str], *, rows: int = 65536) -> Iterator[tuple[list[str | int], np.ndarray]]:
    """Batches of at most `rows` rows: (item ids, float32 [rows, D]). Raises InputError like `read_vectors`."""
    with _open(path) as file:
        read = 0
        batches = file.iter_batches(batch_size=rows, columns=[ID_FIELD, VECTOR_FIELD])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowInvalid, OSError) as error:  # a null in the place of a vector, or damage
                raise InputError(
                    f"the rows from {read} on cannot be read ({error})", file=path, field=VECTOR_FIELD, remedy=_REMEDY
                ) from error
            if batch is None:
                return
            yield batch.column(0).to_pylist(), _matrix(batch, read, path)
            read += batch.num_rows


def read_vectors(path: str | os.PathLike[str]) -> tuple[list[str | int], np.ndarray]:
    """All item ids and vectors, float32 [items, D].

    The array is filled batch by batch, so there is never more in memory than it and one batch. Raises InputError that
    names the file, row and field for a file that is missing or not Parquet, columns that are missing or of another
    type, a null, and a value that is not finite.
    """
    with _open(path) as file:
        items, dimensions = file.metadata.num_rows, file.schema_arrow.field(VECTOR_FIELD).type.list_size
    item_ids: list[str | int] = []
    vectors_ID = np.empty((items, dimensions), dtype=np.float32)
    for ids, block in iterate_vectors(path):
        vectors_ID[len(item_ids) : len(item_ids) + len(ids)] = block
        item_ids.extend(ids)
    return item_ids, vectors_ID


def vectors_of(path: str | os.PathLike[str], item_ids: Sequence[str | int]) -> np.ndarray:
    """The vectors of these items, float32 [len(item_ids), D], wherever they stand in the file.

    Raises InputError that names an item which the file lacks, and like `read_vectors`.
    """
    known_ids, vectors = read_vectors(path)
    place = {item_id: row for row, item_id in enumerate(known_ids)}
    missing = [item_id for item_id in item_ids if item_id not in place]
    if missing:
        raise InputError(
            f"{len(missing)} items have no vector, among them {missing[0]!r}", file=path, field=ID_FIELD, remedy=_REMEDY
        )
    return vectors[np.array([place[item_id] for item_id in item_ids], dtype=np.int64)]


def first_row_not_finite(vectors: np.ndarray) -> int | None:
    """The first row that holds NaN or an infinity."""
    bad = np.nonzero(~np.isfinite(vectors).all(axis=1))[0]
    return int(bad[0]) if bad.size else None


def _open(path: str | os.PathLike[str]) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise InputError("the file does not exist", file=path, remedy=_REMEDY) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not readable as Parquet ({error})", file=path, remedy=_REMEDY) from error
    schema = file.schema_arrow
    for name in (ID_FIELD, VECTOR_FIELD):
        if name not in schema.names:
            file.close()
            raise InputError("the column is missing", file=path, field=name, remedy=_REMEDY)
    kind = schema.field(VECTOR_FIELD).type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
        file.close()
        raise InputError(
            f"values are of type {kind}", file=path, field=VECTOR_FIELD,
            remedy="Store vectors as fixed-size lists of float32.",
        )  # fmt: skip
    return file


def _matrix(batch: pa.RecordBatch, first_row: int, path: str | os.PathLike[str]) -> np.ndarray:
    for name, column in zip((ID_FIELD, VECTOR_FIELD), batch.columns, strict=True):
        if column.null_count:
            row = int(np.nonzero(column.is_null().to_numpy(zero_copy_only=False))[0][0])
            raise InputError("value is null", file=path, row=first_row + row, field=name, remedy=_REMEDY)
    values = batch.column(1)
    flat = values.flatten().to_numpy(zero_copy_only=False)  # a null inside a vector turns into NaN
    block = flat.reshape(len(values), values.type.list_size)
    bad = first_row_not_finite(block)
    if bad is not None:
        raise InputError(
            "the vector holds a value that is missing or not finite", file=path, row=first_row + bad,
            field=VECTOR_FIELD, remedy=_REMEDY,
        )  # fmt: skip
    return block
