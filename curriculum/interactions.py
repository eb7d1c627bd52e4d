"""Interactions to user sequences: checked, without repeats, filtered to a k-core, in an order that leaks nothing."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from item_index.catalogue import Catalogue
from item_index.input_error import InputError
from item_index.parquet_table import ParquetTable, is_text

# One item for the test, one for the validation and at least one to train on.
FEWEST_INTERACTIONS = 3


@dataclass(frozen=True, eq=False)
class Interactions:
    """N interactions in the order of their file.

    Attributes:
        user_ids: the distinct users, sorted; all integers or all strings.
        users: int64 [N], places in `user_ids`.
        items: int64 [N], rows of the catalogue.
        timestamps: int64 [N], in the unit of the file (microseconds since 1970 where the file has ISO 8601 strings).
    """

    user_ids: tuple[str | int, ...]
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, eq=False)
class UserSequences:
    """The items of U users in time order.

    Leave-one-out goes by place: a user's last item is the test target, the one before it the validation target, and the
    rest is for training.

    Attributes:
        user_ids: the users, sorted.
        offsets_U1: int64 [U + 1]; user u owns `items[offsets_U1[u] : offsets_U1[u + 1]]`.
        items: int64 [total], rows of the filtered catalogue.
        timestamps: int64 [total], in the unit of the file.
    """

    user_ids: tuple[str | int, ...]
    offsets_U1: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.user_ids)

    def sequence(self, user: int) -> np.ndarray:
        """int64 [n]: all items of the user at place `user`, in time order."""
        return self.items[self.offsets_U1[user] : self.offsets_U1[user + 1]]

    def train(self, user: int) -> np.ndarray:
        """int64 [n - 2]: the user's items without the validation and the test target."""
        return self.sequence(user)[:-2]

    @cached_property
    def places(self) -> dict[str | int, int]:
        """Place of each user id."""
        return {user_id: place for place, user_id in enumerate(self.user_ids)}

    def trains_on(self, user_id: str | int, item: int) -> bool:
        """Whether the train part of this user holds the item (a row of the catalogue); False for an unknown user."""
        place = self.places.get(user_id)
        return place is not None and bool((self.train(place) == item).any())

    def train_matrix(self, items: int) -> sparse.csr_array:
        """float32 [users, items], 1 where the user's train part holds the item: nothing of validation and test."""
        lengths = np.diff(self.offsets_U1)
        training = np.arange(len(self.items)) < np.repeat(self.offsets_U1[1:] - 2, lengths)
        columns = self.items[training]
        offsets = np.concatenate([[0], np.cumsum(lengths - 2)])
        return sparse.csr_array(
            (np.ones(len(columns), dtype=np.float32), columns, offsets), shape=(len(self), items)
        ).sorted_indices()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of users, offsets and items: the same split has the same fingerprint on every machine."""
        digest = hashlib.sha256(json.dumps(self.user_ids).encode())
        digest.update(self.offsets_U1.astype("<i8").tobytes())
        digest.update(self.items.astype("<i8").tobytes())
        return digest.hexdigest()


def load_interactions(path: str | os.PathLike[str], catalogue: Catalogue) -> Interactions:
    """Read `interactions.parquet`.

    Columns: user_id and item_id (integer or string, item ids of the same kind as the catalogue's) and timestamp: an
    integer of any unit, an Arrow timestamp or date, or a string in ISO 8601 (taken as UTC where it names no zone).
    Raises InputError that names the file, row and field for a file that is missing, empty or not Parquet, a missing
    column, a null, a wrong type, an item that the catalogue lacks and a time that cannot be read.
    """
    table = ParquetTable(path, ("user_id", "item_id", "timestamp"))
    users = table.identifiers("user_id")
    user_ids = users.unique().sort()
    return Interactions(
        user_ids=tuple(user_ids.to_pylist()),
        users=pc.index_in(users, value_set=user_ids).to_numpy().astype(np.int64),
        items=_catalogue_rows(table, catalogue),
        timestamps=_timestamps(table),
    )


def _catalogue_rows(table: ParquetTable, catalogue: Catalogue) -> np.ndarray:
    items = table.identifiers("item_id")
    known = pa.array(catalogue.item_ids, pa.large_string() if isinstance(catalogue.item_ids[0], str) else pa.int64())
    if known.type != items.type:
        kinds = {True: "strings", False: "integers"}
        raise table.error(
            f"item ids are {kinds[is_text(items.type)]}, but the catalogue's are {kinds[is_text(known.type)]}",
            field="item_id",
            remedy="Store them as the same kind in both tables.",
        )
    rows = pc.index_in(items, value_set=known)
    if rows.null_count:
        unknown = np.nonzero(rows.is_null().to_numpy(zero_copy_only=False))[0]
        row = int(unknown[0])
        more = f" (and so are {unknown.size - 1} more rows)" if unknown.size > 1 else ""
        raise table.error(
            f"item {items[row].as_py()!r} is not in the catalogue{more}",
            row=row,
            field="item_id",
            remedy="Add the item to the catalogue or leave the interaction out.",
        )
    return rows.to_numpy().astype(np.int64)


def _timestamps(table: ParquetTable) -> np.ndarray:
    array = table.column("timestamp", remedy_for_null="Give every interaction a time.")
    kind = array.type
    if pa.types.is_integer(kind):
        return table.integers("timestamp", array).to_numpy()
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        return array.cast(pa.int64()).to_numpy()
    if pa.types.is_date32(kind):
        return array.cast(pa.int32()).to_numpy().astype(np.int64)
    remedy = "Store the time as an integer, an Arrow timestamp or date, or an ISO 8601 string."
    if not is_text(kind):
        raise table.error(f"times are of type {kind}", field="timestamp", remedy=remedy)
    times = np.empty(len(array), dtype=np.int64)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    for row, text in enumerate(array.to_pylist()):
        try:
            time = datetime.fromisoformat(text)
        except ValueError as error:
            raise table.error(f"unparsable time {text!r}", row=row, field="timestamp", remedy=remedy) from error
        aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
        times[row] = (aware - epoch) // timedelta(microseconds=1)
    return times


def build_sequences(
    interactions: Interactions, catalogue: Catalogue, *, minimum_interactions: int = 5, seed: int = 0
) -> tuple[Catalogue, UserSequences]:
    """Sequences of all users, and the catalogue of the items that occur in them.

    Repeated (user, item) pairs keep their first time. Users and items with fewer than `minimum_interactions` distinct
    partners are dropped until none is left (k-core). Interactions of one user at one time are put in random order: they
    are brought into an order by ids, shuffled by `seed`, and sorted stably by time, so neither the file's order nor the
    catalogue's can show through.

    Raises InputError for `minimum_interactions` below 3 and where nothing is left.
    """
    if minimum_interactions < FEWEST_INTERACTIONS:
        raise InputError(
            f"minimum_interactions is {minimum_interactions}",
            field="minimum_interactions",
            remedy=f"At least {FEWEST_INTERACTIONS} are needed: a test and a validation target, and one to train on.",
        )
    order_of_ids = np.argsort(np.array(catalogue.item_ids), kind="stable")
    place_of_item = np.empty(len(catalogue), dtype=np.int64)
    place_of_item[order_of_ids] = np.arange(len(catalogue))

    users, items, times = interactions.users, interactions.items, interactions.timestamps
    order = np.lexsort((times, place_of_item[items], users))
    users, items, times = users[order], items[order], times[order]
    first = np.ones(len(users), dtype=bool)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    distinct = int(first.sum())
    kept = _k_core(users, items, first, minimum_interactions)
    users, items, times = users[kept], items[kept], times[kept]
    if users.size == 0:
        raise InputError(
            f"none of {distinct} distinct interactions is left after the {minimum_interactions}-core filter",
            field="minimum_interactions",
            remedy="Lower it (3 at least) or give more interactions.",
        )

    shuffled = np.random.default_rng(seed).permutation(len(users))
    order = shuffled[np.lexsort((times[shuffled], users[shuffled]))]  # lexsort is stable
    users, items, times = users[order], items[order], times[order]

    kept_items, items = np.unique(items, return_inverse=True)
    kept_users, lengths = np.unique(users, return_counts=True)
    sequences = UserSequences(
        user_ids=tuple(interactions.user_ids[user] for user in kept_users),
        offsets_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=items.astype(np.int64),
        timestamps=times,
    )
    return catalogue.select(kept_items), sequences


def _k_core(users: np.ndarray, items: np.ndarray, kept: np.ndarray, minimum: int) -> np.ndarray:
    """bool [N]: the largest part of `kept` in which every user and every item occurs `minimum` times or more."""
    while True:
        user_counts = np.bincount(users[kept], minlength=int(users.max()) + 1)
        item_counts = np.bincount(items[kept], minlength=int(items.max()) + 1)
        fewer = kept & (user_counts[users] >= minimum) & (item_counts[items] >= minimum)
        if fewer.sum() == kept.sum():
            return kept
        kept = fewer
