"""Supervised rows as Parquet, one file per pass, one row group per optimizer step: any step can be read by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curriculum.rows import Row
from item_index.ragged import RaggedArray

SCHEMA = pa.schema(
    {"task": pa.dictionary(pa.int32(), pa.string()), "tokens": pa.list_(pa.int32()), "learnt": pa.list_(pa.bool_())}
)


def write_rows(path: str | os.PathLike[str], rows: Iterable[tuple[str, Row]], *, rows_per_step: int) -> None:
    """Write (task, row) pairs in their order; the file appears only when it is whole. One step is in memory."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    with pq.ParquetWriter(unfinished, SCHEMA) as writer:
        waiting = iter(rows)
        while step := list(islice(waiting, rows_per_step)):
            columns = [
                pa.array([task for task, _ in step]).dictionary_encode(),
                pa.array([tokens for _, (tokens, _) in step], SCHEMA.field("tokens").type),
                pa.array([learnt for _, (_, learnt) in step], SCHEMA.field("learnt").type),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))
    os.replace(unfinished, target)


class RowFile:
    """Reads what `write_rows` wrote, step by step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = pq.ParquetFile(path)

    def __len__(self) -> int:
        """Number of steps."""
        return int(self._file.num_row_groups)

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def step(self, number: int) -> tuple[list[str], RaggedArray, RaggedArray]:
        """Tasks, tokens (int32) and loss masks (bool) of a step's rows."""
        table = self._file.read_row_group(number)
        tokens, learnt = (table[name].combine_chunks() for name in ("tokens", "learnt"))
        offsets = tokens.offsets.to_numpy().astype(np.int64)
        return (
            table["task"].to_pylist(),
            RaggedArray(tokens.values.to_numpy(), offsets),
            RaggedArray(learnt.values.to_numpy(zero_copy_only=False), offsets),
        )

    def __iter__(self) -> Iterator[tuple[list[str], RaggedArray, RaggedArray]]:
        return (self.step(number) for number in range(len(self)))
