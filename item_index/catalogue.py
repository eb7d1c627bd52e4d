"""The items and their text, as the user's `items.parquet` gives them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from item_index.parquet_table import ParquetTable, first_repeat, is_text

CATEGORY_SEPARATOR = "|"


@dataclass(frozen=True)
class Review:
    """What one user wrote about one item; `user_id` is of the kind that the interactions' user ids are."""

    user_id: str | int
    text: str


@dataclass(frozen=True)
class Catalogue:
    """I items; an item is known by its row everywhere else in the project.

    Attributes:
        item_ids: the user's ids, all integers or all strings, no two the same.
        titles: never blank.
        descriptions: "" where there is none.
        categories: category names of each item, maybe none.
        brands: "" where there is none.
        reviews: of each item, maybe none; left out, no item has any.
    """

    item_ids: tuple[str | int, ...]
    titles: tuple[str, ...]
    descriptions: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    brands: tuple[str, ...]
    reviews: tuple[tuple[Review, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.reviews:
            object.__setattr__(self, "reviews", ((),) * len(self.item_ids))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Catalogue:
        """Read `items.parquet`, keeping its order of rows.

        Columns: item_id (integer or string), title (string), and where present description, brand (string), categories
        (list of strings, or one string separated by "|") and reviews (list of structs with user_id and text); others
        are left alone. Raises InputError that names the file, row and field for a file that is missing, empty or not
        Parquet, a missing column, a wrong type, a null or repeated id, a null or blank title, and a review that is
        null or lacks its user or text.
        """
        table = ParquetTable(path, ("item_id", "title"), ("description", "categories", "brand", "reviews"))
        item_ids = table.identifiers("item_id")
        if repeat := first_repeat(item_ids):
            first, second = repeat
            raise table.error(
                f"item id {item_ids[second].as_py()!r} is already taken by row {first}",
                row=second,
                field="item_id",
                remedy="Give every item one row and an id of its own.",
            )
        return cls(
            item_ids=tuple(item_ids.to_pylist()),
            titles=tuple(table.texts("title", required=True)),
            descriptions=tuple(table.texts("description", required=False)),
            categories=_read_categories(table),
            brands=tuple(table.texts("brand", required=False)),
            reviews=_read_reviews(table),
        )

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def rows(self) -> dict[str | int, int]:
        """Row of each item id."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def select(self, rows: np.ndarray) -> Catalogue:
        """The catalogue of the given rows (integers), in the given order."""
        kept = [int(row) for row in rows]
        return Catalogue(
            item_ids=tuple(self.item_ids[row] for row in kept),
            titles=tuple(self.titles[row] for row in kept),
            descriptions=tuple(self.descriptions[row] for row in kept),
            categories=tuple(self.categories[row] for row in kept),
            brands=tuple(self.brands[row] for row in kept),
            reviews=tuple(self.reviews[row] for row in kept),
        )


def _read_categories(table: ParquetTable) -> tuple[tuple[str, ...], ...]:
    if "categories" not in table:
        return ((),) * table.rows
    array = table.column("categories")
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if not is_text(kind.value_type) and not pa.types.is_null(kind.value_type):
            raise table.error(f"lists hold {kind.value_type}", field="categories", remedy="Store lists of strings.")
        lists = [value or [] for value in array.to_pylist()]
        for row, names in enumerate(lists):
            if None in names:
                raise table.error(
                    "a category of the list is null", row=row, field="categories", remedy="Leave it out of the list."
                )
    elif is_text(kind) or pa.types.is_null(kind):
        lists = [(value or "").split(CATEGORY_SEPARATOR) for value in array.to_pylist()]
    else:
        raise table.error(
            f"values are of type {kind}",
            field="categories",
            remedy=f"Store lists of strings, or strings separated by '{CATEGORY_SEPARATOR}'.",
        )
    return tuple(tuple(name.strip() for name in names if name.strip()) for names in lists)


def _read_reviews(table: ParquetTable) -> tuple[tuple[Review, ...], ...]:
    if "reviews" not in table:
        return ((),) * table.rows
    array = table.column("reviews")
    kind = array.type
    if pa.types.is_null(kind):
        return ((),) * table.rows
    fields: dict[str, pa.DataType] = {}
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        fields = {field.name: field.type for field in kind.value_type}
    user, text = fields.get("user_id"), fields.get("text")
    if user is None or text is None or not (pa.types.is_integer(user) or is_text(user)) or not is_text(text):
        raise table.error(
            f"values are of type {kind}",
            field="reviews",
            remedy="Store lists of structs with user_id (integer or string) and text (string).",
        )
    reviews = []
    for row, values in enumerate(array.to_pylist()):
        for place, review in enumerate(values or ()):
            missing = [name for name in ("user_id", "text") if review is None or review[name] is None]
            if missing:
                raise table.error(
                    f"review {place} of the list has no {' and no '.join(missing)}",
                    row=row,
                    field="reviews",
                    remedy="Leave it out of the list.",
                )
        reviews.append(tuple(Review(review["user_id"], review["text"]) for review in values or ()))
    return tuple(reviews)
