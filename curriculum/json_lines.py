"""Text files of one record a line, gzipped or not: every complaint names the file, the line and the field."""

from __future__ import annotations

import ast
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from item_index.input_error import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_SHOWN_FIELDS = 12
# Half of an emoji, as a text that was cut in the middle of one leaves behind: no file can be written with it.
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of one line; `line` counts from 1."""

    file: Path
    line: int
    values: dict[str, Any]

    def error(self, problem: str, *, field: str | None = None, remedy: str = "") -> InputError:
        """An InputError about this line."""
        return InputError(problem, file=self.file, line=self.line, field=field, remedy=remedy)

    def identifier(self, field: str) -> str:
        """An id: a string of printable characters. Raises InputError for anything else and where there is none."""
        value = self._required(field)
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise self.error(f"{_shown(value)} is not an id", field=field, remedy="Ids are strings and never blank.")
        return value

    def integer(self, field: str) -> int:
        """A whole number that fits int64. Raises InputError for anything else and where there is none."""
        value = self._required(field)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > np.iinfo(np.int64).max:
            raise self.error(f"{_shown(value)} is not a whole number of 64 bits", field=field)
        return value

    def number(self, field: str) -> float:
        """A finite number. Raises InputError for anything else and where there is none."""
        value = self._required(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(f"{_shown(value)} is not a number", field=field)
        return float(value)

    def texts(self, field: str) -> list[str]:
        """The strings of a field, lists of any depth laid out flat; none where the field is missing or null.

        Half characters (lone surrogates) turn into U+FFFD. Raises InputError where there is anything but text.
        """
        found: list[str] = []
        waiting = [self.values.get(field)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                found.append(_SURROGATES.sub("\ufffd", value))
            elif isinstance(value, list | tuple):
                waiting.extend(reversed(value))
            elif value is not None:
                raise self.error(f"{_shown(value)} is not text", field=field)
        return found

    def _required(self, field: str) -> Any:
        if field not in self.values:
            names = ", ".join(list(self.values)[:_SHOWN_FIELDS]) or "no fields"
            raise self.error(f"the field is missing; the line has {names}", field=field)
        return self.values[field]


class JsonLines:
    """The records of a file, read line by line each time it is iterated: one line is in memory.

    Whether the file is gzipped is seen by its first two bytes, whatever its name.

    Args:
        path: file with one JSON object a line, in UTF-8.
        python_literals: accept lines that are Python dict literals as well. They are parsed, never evaluated.

    Raises InputError at once for a file that is missing or cannot be opened, and one named .gz that is not gzipped;
    while iterating, for a line that is no object, for damaged or truncated compression, and for a file without lines.
    """

    def __init__(self, path: Path, *, python_literals: bool = False) -> None:
        self.path = path
        self._python_literals = python_literals
        try:
            with path.open("rb") as file:
                magic = file.read(len(_GZIP_MAGIC))
        except FileNotFoundError as error:
            raise InputError("the file does not exist", file=path, remedy="Give the path of the download.") from error
        except OSError as error:
            raise InputError(f"the file cannot be opened ({error.strerror})", file=path) from error
        self._gzipped = magic == _GZIP_MAGIC
        if path.suffix == ".gz" and not self._gzipped:
            raise InputError(
                "named .gz but not gzipped", file=path, remedy="Download it again, or drop .gz from the name."
            )

    def __iter__(self) -> Iterator[Record]:
        number = 0
        with self._open() as lines:
            while line := self._read_line(lines, number + 1):
                number += 1
                yield Record(self.path, number, self._parse(line, number))
        if number == 0:
            raise InputError("the file has no lines", file=self.path, remedy="Download it again.")

    def _open(self) -> BinaryIO:
        return gzip.open(self.path, "rb") if self._gzipped else self.path.open("rb")  # type: ignore[return-value]

    def _read_line(self, lines: BinaryIO, number: int) -> bytes:
        try:
            return lines.readline()
        except EOFError as error:
            raise InputError(
                "the compressed file ends in the middle", file=self.path, line=number, remedy="Download it again."
            ) from error
        except (OSError, zlib.error) as error:
            raise InputError(
                f"the file cannot be read on ({error})", file=self.path, line=number, remedy="Download it again."
            ) from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        wanted = "a JSON object or a Python dict literal" if self._python_literals else "a JSON object"
        try:
            try:
                values = json.loads(line)
            except ValueError:
                if not self._python_literals:
                    raise
                values = ast.literal_eval(line.decode())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # the four that literal_eval names
            why = f" ({error.msg} at character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(
                f"the line is not {wanted}{why}", file=self.path, line=number,
                remedy="Download the file again, or mend the line.",
            ) from error  # fmt: skip
        if not isinstance(values, dict):
            raise InputError(f"the line is not {wanted} but {_shown(values)}", file=self.path, line=number)
        return values


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
