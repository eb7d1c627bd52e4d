"""The one error for input that the user can mend: it says what is wrong, where, and what to do."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Bad input from outside: a data file, a setting, a path or a missing package.

    Attributes:
        problem: what is wrong, as a clause without a full stop.
        file: file at fault, when there is one.
        row: 0-based data row in that file.
        line: line of that file, counted from 1 as editors do, where it is text.
        field: column or setting at fault.
        remedy: what to do, as a sentence.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        row: int | None = None,
        line: int | None = None,
        field: str | None = None,
        remedy: str = "",
    ) -> None:
        # Only `problem` goes into `args`: unpickling calls the class with `args` and restores the attributes after
        # that, so the error reads the same when it comes back from another process.
        super().__init__(problem)
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.row = None if row is None else int(row)
        self.line = line
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        places = []
        if self.file is not None:
            places.append(self.file)
        if self.row is not None:
            places.append(f"row {self.row}")
        if self.line is not None:
            places.append(f"line {self.line}")
        if self.field is not None:
            places.append(f"field '{self.field}'")
        where = f"{', '.join(places)}: " if places else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{where}{self.problem.rstrip('.')}.{remedy}"
