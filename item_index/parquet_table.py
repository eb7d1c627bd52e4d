"""Reading the user's Parquet tables: every complaint names the file, the row and the column."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from item_index.input_error import InputError


class ParquetTable:
    """The named columns of a Parquet file, each one contiguous and free of dictionary encoding.

    Args:
        path: file (or folder of Parquet files), local or any URI that Arrow's file systems reach.
        required: columns that must be there.
        optional: columns that are read where they are there; all others are left alone.

    Raises InputError where the file is missing, is not Parquet, lacks a required column or has no rows.
    """

    def __init__(self, path: str | os.PathLike[str], required: Sequence[str], optional: Sequence[str] = ()) -> None:
        self.path = os.fspath(path)
        try:
            dataset = pq.ParquetDataset(self.path, partitioning=None)
            names = dataset.schema.names
            for name in required:
                if name not in names:
                    raise InputError(
                        f"the column is missing; the file has {', '.join(names) or 'no columns'}",
                        file=self.path,
                        field=name,
                        remedy=f"The columns {', '.join(required)} are needed.",
                    )
            table = dataset.read(columns=[*required, *(name for name in optional if name in names)])
        except FileNotFoundError as error:
            raise InputError("the file does not exist", file=self.path, remedy="Give the path of the table.") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"not readable as Parquet ({error})", file=self.path, remedy="Write the table as a Parquet file."
            ) from error
        if table.num_rows == 0:
            raise InputError("the file has no rows", file=self.path, remedy="Give at least one row.")
        self.rows: int = table.num_rows
        self._columns: dict[str, pa.Array] = {}
        for name in table.column_names:
            array = pa.concat_arrays(table.column(name).chunks)
            self._columns[name] = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def error(self, problem: str, *, row: int | None = None, field: str, remedy: str = "") -> InputError:
        """An InputError about this file."""
        return InputError(problem, file=self.path, row=row, field=field, remedy=remedy)

    def column(self, name: str, *, remedy_for_null: str | None = None) -> pa.Array:
        """The column as it is; with `remedy_for_null` the first null raises InputError."""
        array = self._columns[name]
        if remedy_for_null is not None and array.null_count:
            row = int(np.nonzero(array.is_null().to_numpy(zero_copy_only=False))[0][0])
            raise self.error("value is null", row=row, field=name, remedy=remedy_for_null)
        return array

    def identifiers(self, name: str) -> pa.Array:
        """A column of ids without nulls, as Arrow int64 or large_string; any other type raises InputError."""
        array = self.column(name, remedy_for_null="Give every row an id.")
        if pa.types.is_integer(array.type):
            return self.integers(name, array)
        if is_text(array.type):
            return array.cast(pa.large_string())
        raise self.error(
            f"ids are of type {array.type}", field=name, remedy="Store ids as integers or strings, without nulls."
        )

    def integers(self, name: str, array: pa.Array) -> pa.Array:
        """An integer column as Arrow int64; a value beyond int64 raises InputError."""
        if pa.types.is_uint64(array.type):
            beyond = np.nonzero(array.to_numpy() > np.uint64(np.iinfo(np.int64).max))[0]
            if beyond.size:
                row = int(beyond[0])
                raise self.error(f"{array[row].as_py()} is too large for 64 bits with a sign", row=row, field=name)
        return array.cast(pa.int64())

    def texts(self, name: str, *, required: bool) -> list[str]:
        """A column of strings; a missing column or a null is "" unless `required`, which also refuses blank text."""
        if name not in self:
            return [""] * self.rows
        remedy = f"Give every row a {name}."
        array = self.column(name, remedy_for_null=remedy if required else None)
        if not is_text(array.type) and not pa.types.is_null(array.type):
            raise self.error(f"values are of type {array.type}", field=name, remedy="Store them as strings.")
        values = [value or "" for value in array.to_pylist()]
        if required:
            blank = next((row for row, value in enumerate(values) if not value.strip()), None)
            if blank is not None:
                raise self.error("value is empty", row=blank, field=name, remedy=remedy)
        return values


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether an Arrow type is one of the string types."""
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)


def first_repeat(array: pa.Array) -> tuple[int, int] | None:
    """Rows of the first value that occurs again: (its first row, the row that repeats it); None where all differ."""
    if pc.count_distinct(array).as_py() == len(array):
        return None
    seen: dict[object, int] = {}
    for row, value in enumerate(array.to_pylist()):
        if value in seen:
            return seen[value], row
        seen[value] = row
    return None
