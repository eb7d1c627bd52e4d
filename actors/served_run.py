"""What a replica of the service reads of a run folder: index, catalogue, histories, prompts, and which versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from curriculum.corpus import load_sequences
from curriculum.prompts import PromptBuilder
from item_index.catalogue import Catalogue
from item_index.constraint import Mode
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex


class UnknownId(ValueError):
    """A request names an item or a user that this version does not have."""

    def __init__(self, kind: str, value: str | int) -> None:
        super().__init__(kind, value)
        self.kind, self.value = kind, value

    def __str__(self) -> str:
        return f"there is no {self.kind} {self.value!r}"


@dataclass(frozen=True)
class Query:
    """A recommendation that is asked for.

    Attributes:
        history: item ids, the oldest first; None takes the user's.
        user_id: whose interactions are the history where none is given.
        k: items wanted.
        exclude: item ids that must not be recommended.
        exclude_history: nor those of the history.
        chains, temperature, seed: of reasoning mode.
    """

    mode: Mode
    k: int
    history: tuple[str | int, ...] | None = None
    user_id: str | int | None = None
    exclude: tuple[str | int, ...] = ()
    exclude_history: bool = True
    chains: int = 1
    temperature: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Item:
    """An item as the service shows it; `path` are the tokens of its semantic ID, level by level."""

    item_id: str | int
    title: str
    path: tuple[str, ...]
    description: str = ""
    categories: tuple[str, ...] = ()
    brand: str = ""
    score: float | None = None


class ServedRun:
    """The catalogue's side of a run folder.

    Attributes:
        versions: of the checkpoint and of the index, which every answer names.
    """

    def __init__(
        self, run_folder: str, checkpoint_folder: str, *, versions: dict[str, str], tokenizer: Any, tokens: Any
    ) -> None:
        """Raises InputError where the folder has other versions than those planned, or another catalogue."""
        folder = Path(run_folder)
        self.index = SemanticIdIndex.load(folder / "index")
        self.catalogue = Catalogue.load(folder / "corpus" / "items.parquet")
        self.sequences = load_sequences(folder / "corpus")
        summary = json.loads((folder / "corpus" / "summary.json").read_text())
        self.builder = PromptBuilder(tokenizer, self.index, tokens, history_items=summary["history_items"])
        self.versions = planned_versions(folder, Path(checkpoint_folder))
        if self.versions != versions:
            raise InputError(
                f"the folder has {self.versions} now, and {versions} was deployed", file=folder,
                remedy="Deploy it again: replicas of one deployment must not answer by different versions.",
            )  # fmt: skip
        if tuple(self.catalogue.item_ids) != tuple(self.index.item_ids):
            raise InputError(
                "the items are not those of the index", file=folder / "corpus" / "items.parquet",
                remedy="Run the corpus stage after the index stage.",
            )  # fmt: skip

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Row by id, written as text: a path of a URL knows no numbers."""
        return {str(item_id): row for row, item_id in enumerate(self.catalogue.item_ids)}

    @cached_property
    def _users(self) -> dict[str, int]:
        return {str(user_id): place for place, user_id in enumerate(self.sequences.user_ids)}

    @cached_property
    def _titles(self) -> list[str]:
        return [title.casefold() for title in self.catalogue.titles]

    def row(self, item_id: str | int) -> int:
        """Row of an item. Raises UnknownId."""
        row = self._rows.get(str(item_id))
        if row is None:
            raise UnknownId("item", item_id)
        return row

    def history_of(self, query: Query) -> np.ndarray:
        """int64 [n]: item rows of the query's history, the oldest first. Raises UnknownId."""
        if query.history is not None:
            return np.array([self.row(item_id) for item_id in query.history], dtype=np.int64)
        place = self._users.get(str(query.user_id))
        if place is None:
            raise UnknownId("user", query.user_id if query.user_id is not None else "")
        return self.sequences.sequence(place)

    def excluded_by(self, query: Query, history: np.ndarray) -> np.ndarray:
        """int64 [n], sorted: item rows that must not be recommended. Raises UnknownId."""
        asked = np.array([self.row(item_id) for item_id in query.exclude], dtype=np.int64)
        return np.union1d(asked, history) if query.exclude_history else np.unique(asked)

    def item(self, row: int, score: float | None = None) -> dict[str, Any]:
        """An item with all that the catalogue says of it."""
        catalogue = self.catalogue
        codes = self.index.codes_IL[row, : self.index.lengths_I[row]]
        path = tuple(self.index.token(level, int(code)) for level, code in enumerate(codes))
        return asdict(
            Item(
                catalogue.item_ids[row], catalogue.titles[row], path, catalogue.descriptions[row],
                catalogue.categories[row], catalogue.brands[row], score,
            )
        )  # fmt: skip

    def ranked(self, items_K: np.ndarray, scores_K: np.ndarray, k: int) -> list[dict[str, Any]]:
        """The first k items of a ranked list that may end with -1."""
        kept = np.flatnonzero(items_K >= 0)[:k]
        return [self.item(int(items_K[place]), float(scores_K[place])) for place in kept]

    def search(self, words: str, limit: int) -> list[dict[str, Any]]:
        """Items whose title holds all the words, those first that begin with the first of them."""
        wanted = words.casefold().split()
        found = [row for row, title in enumerate(self._titles) if all(word in title for word in wanted)]
        found.sort(key=lambda row: (not self._titles[row].startswith(wanted[0]) if wanted else False, row))
        return [self.item(row) for row in found[:limit]]

    def users(self, beginning: str, limit: int) -> list[str | int]:
        """User ids that begin like this."""
        return [one for one in self.sequences.user_ids if str(one).startswith(beginning)][:limit]

    def with_titles(self, text: str, rows: Sequence[int]) -> str:
        """A text in which the semantic IDs of some items are replaced by their titles in brackets."""
        for row in sorted(set(rows), key=lambda row: -int(self.index.lengths_I[row])):
            text = text.replace(self.index.text(row), f" [{self.catalogue.titles[row]}]")
        return text


def planned_versions(run_folder: Path, checkpoint_folder: Path) -> dict[str, str]:
    """What a run folder has now, by name. Raises InputError where index or weights are missing."""
    index = SemanticIdIndex.load(run_folder / "index").version
    return {"checkpoint": checkpoint_version(checkpoint_folder), "index": index}


def checkpoint_version(folder: Path) -> str:
    """Name of the stage that wrote a checkpoint, and a hash of its weights. Raises InputError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            "there are no weights", file=folder, remedy="Run its stage, or name another by serving.checkpoint."
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{folder.parent.name}-{digest.hexdigest()[:12]}"
