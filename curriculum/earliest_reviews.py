"""The earliest reviews of every item, out of any number of them and in any order: an external merge sort."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from item_index.catalogue import Review

# item, time, user id, text: the order of a tuple is the order wanted.
_Row: TypeAlias = tuple[int, int, str, str]
_SCHEMA = pa.schema(
    {"item": pa.int64(), "time": pa.int64(), "user_id": pa.large_string(), "text": pa.large_string()}
)  # fmt: skip
_GROUP_ROWS = 1024  # of one row group: what is in memory of each run while they are merged
_ROW_CHARACTERS = 300  # what a row takes in memory besides its text, counted in characters


class EarliestReviews:
    """Keeps the `reviews_per_item` earliest reviews of each item, at most one of a user.

    Order is by time, then user, then text, so what is kept does not depend on the order in which reviews come. Where
    more text than `characters_in_memory` has come, it is sorted, thinned and written to `folder` as a run; the runs are
    merged at the end. In memory are that much text, and later 1,024 reviews of every run.

    Args:
        folder: an existing folder for the runs, which stay there.
        reviews_per_item: at least 1.
        characters_in_memory: of text, and of what Python adds to it.
    """

    def __init__(self, folder: Path, reviews_per_item: int, *, characters_in_memory: int = 1 << 27) -> None:
        if reviews_per_item < 1:
            raise ValueError(f"reviews_per_item must be at least 1, got {reviews_per_item}")
        self._folder = folder
        self._reviews_per_item = reviews_per_item
        self._characters_in_memory = characters_in_memory
        self._held: list[_Row] = []
        self._characters = 0
        self._runs: list[Path] = []

    def add(self, item: int, time: int, user_id: str, text: str) -> None:
        """Take one review of the item `item` (a number of the caller's)."""
        self._held.append((item, time, user_id, text))
        self._characters += len(text) + _ROW_CHARACTERS
        if self._characters > self._characters_in_memory:
            self._write_run()

    def by_item(self) -> Iterator[tuple[int, tuple[Review, ...]]]:
        """Items in ascending order with their reviews, the earliest first; items without any are left out."""
        self._held.sort()
        merged = heapq.merge(*(_read_run(run) for run in self._runs), self._held)
        for item, rows in groupby(merged, key=itemgetter(0)):
            yield item, tuple(Review(user_id, text) for _, _, user_id, text in self._earliest(rows))

    def _write_run(self) -> None:
        """What a run leaves out is not among the item's earliest overall either, so thinning it loses nothing."""
        self._held.sort()
        kept = [row for _, rows in groupby(self._held, key=itemgetter(0)) for row in self._earliest(rows)]
        run = self._folder / f"run-{len(self._runs)}.parquet"
        columns = [pa.array(values, kind) for values, kind in zip(zip(*kept, strict=True), _SCHEMA.types, strict=True)]
        pq.write_table(pa.table(columns, schema=_SCHEMA), run, row_group_size=_GROUP_ROWS)
        self._runs.append(run)
        self._held, self._characters = [], 0

    def _earliest(self, rows: Iterable[_Row]) -> Iterator[_Row]:
        """The first rows of one item, in their order, one of a user."""
        users: set[str] = set()
        for row in rows:
            if len(users) == self._reviews_per_item:
                return
            if row[2] not in users:
                users.add(row[2])
                yield row


def _read_run(path: Path) -> Iterator[_Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_GROUP_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
