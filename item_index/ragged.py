"""Rows of unequal length as one flat array with offsets: the form in which batches travel, never padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RaggedArray:
    """Row i is `values[offsets[i]:offsets[i + 1]]`; `offsets` is int64 [rows + 1] and starts at 0."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: Any) -> RaggedArray:
        """From a sequence of rows."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        lengths = [len(array) for array in arrays]
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
        return cls(values.astype(dtype, copy=False), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]."""
        return np.diff(self.offsets)

    def select(self, rows: np.ndarray) -> RaggedArray:
        """Some rows, in the given order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[:-1][rows], lengths)
        return RaggedArray(self.values[source], offsets)

    @staticmethod
    def concatenate(parts: Sequence[RaggedArray]) -> RaggedArray:
        """All rows of all parts."""
        lengths = np.concatenate([part.lengths for part in parts])
        return RaggedArray(
            np.concatenate([part.values for part in parts]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        )
