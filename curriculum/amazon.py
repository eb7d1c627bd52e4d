"""Amazon reviews, the paper's data, in the project's own tables: from the files of 2014, 2018 and 2023.

The fields are those that the publishers of the three collections describe (McAuley Lab, UC San Diego).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from curriculum.earliest_reviews import EarliestReviews
from curriculum.json_lines import JsonLines, Record
from item_index.fusion import LEAST_REVIEW_CHARACTERS
from item_index.input_error import InputError
from item_index.text import clean_text

Kind = Literal["reviews", "metadata"]


@dataclass(frozen=True)
class Release:
    """One of the collections: what the fields are called that are read. `item` names the id in both files."""

    year: int
    item: str
    user: str
    time: str
    rating: str
    text: str
    description: tuple[str, ...]
    categories: str
    brand: str
    python_literals: bool = False  # in the metadata


RELEASES = {
    release.year: release
    for release in (
        Release(
            2014, "asin", "reviewerID", "unixReviewTime", "overall", "reviewText", ("description",), "categories",
            "brand", python_literals=True,
        ),
        Release(
            2018, "asin", "reviewerID", "unixReviewTime", "overall", "reviewText", ("description",), "category", "brand"
        ),
        # The bullet points belong to the description: where its list is empty they are all the text there is.
        Release(
            2023, "parent_asin", "user_id", "timestamp", "rating", "text", ("description", "features"), "categories",
            "store",
        ),
    )
}  # fmt: skip

# Fields that only lines of this kind and year have; the first that fits counts.
_SIGNATURES: tuple[tuple[frozenset[str], Kind, int], ...] = (
    (frozenset({"parent_asin", "user_id"}), "reviews", 2023),
    (frozenset({"parent_asin"}), "metadata", 2023),
    (frozenset({"reviewerID", "verified"}), "reviews", 2018),
    (frozenset({"reviewerID", "helpful"}), "reviews", 2014),
    (frozenset({"asin", "category"}), "metadata", 2018),
    (frozenset({"asin", "categories"}), "metadata", 2014),
)
# Where the crawler of 2018 took a page's script for its title.
_SCRIPT_TITLE = "getTime"
_LARGEST_RATING = 5

_ITEMS, _INTERACTIONS = "items.parquet", "interactions.parquet"
_TEXT = pa.large_string()  # 64-bit offsets: a column may hold more than 2 GB when it is read in one piece
_ITEM_SCHEMA = pa.schema(
    {
        "item_id": _TEXT, "title": _TEXT, "description": _TEXT, "categories": pa.list_(_TEXT), "brand": _TEXT,
        "reviews": pa.list_(pa.struct({"user_id": _TEXT, "text": _TEXT})),
    }
)  # fmt: skip
_STAGED_SCHEMA = pa.schema([field for field in _ITEM_SCHEMA if field.name != "reviews"])
_INTERACTION_SCHEMA = pa.schema({"user_id": _TEXT, "item_id": _TEXT, "timestamp": pa.int64()})
_ITEM_GROUP_ROWS, _INTERACTION_GROUP_ROWS = 2048, 131_072


@dataclass
class AmazonCounts:
    """What was read, dropped and written. Reviews are lines of the review file, items are distinct.

    A review is dropped for one reason, the first of: below the minimum rating, of an item without metadata, of an item
    without a title. Metadata lines are set aside for one reason: the item already has a title, the title is page
    script, there is none. Items that are in the metadata only are dropped too: nobody reviewed them (or not well
    enough). `blank_descriptions` is about the items written.
    """

    metadata_read: int = 0
    metadata_repeated: int = 0
    metadata_with_script_for_title: int = 0
    metadata_without_title: int = 0
    reviews_read: int = 0
    reviews_below_minimum_rating: int = 0
    reviews_of_items_without_metadata: int = 0
    reviews_of_items_without_title: int = 0
    items_without_metadata: int = 0
    items_without_title: int = 0
    items_without_interactions: int = 0
    users: int = 0
    items: int = 0
    interactions: int = 0
    items_with_reviews: int = 0
    review_texts: int = 0
    blank_descriptions: int = 0

    def lines(self) -> list[str]:
        """One line a count, in words."""
        return [f"{name.replace('_', ' ')}: {count}" for name, count in asdict(self).items()]


def convert_amazon(
    year: int,
    *,
    reviews: Path,
    metadata: Path,
    output: Path,
    reviews_per_item: int = 32,
    minimum_rating: float | None = None,
) -> AmazonCounts:
    """Write `items.parquet` and `interactions.parquet` into the folder `output`; returns what was counted.

    items: item_id, title, description, brand string, categories list<string>, reviews list<struct<user_id, text>>, in
    the order of the metadata; interactions: user_id, item_id string, timestamp int64 as the file has it (seconds since
    1970, milliseconds for 2023), in the order of the reviews. An interaction is a review; a user's second review of an
    item stays one, for loading drops repeats. Texts are cleaned. Descriptions of 2023 end with the bullet points. Of an
    item that the metadata repeats, the first line with a title counts.

    Both files are read once, line by line. In memory are the ids of all items and users, the row groups being written
    and some hundred MB of review texts; the rest lies in a temporary folder in `output`. Both tables appear at the end:
    old ones go before, so there are never two that do not belong together.

    Args:
        year: 2014, 2018 or 2023.
        reviews: JSON lines, gzipped or not.
        metadata: the same; of 2014 Python dict literals as well.
        output: made where it does not exist.
        reviews_per_item: the earliest so many of each item are kept, of 20 characters or more, one of a user, ordered
            by (time, user) whatever the file's order; 0 keeps none.
        minimum_rating: from 1 to 5; reviews below it are dropped, their texts as well.

    Raises InputError that names file, line and field for a file that is missing, damaged or of another kind or year, a
    broken line, a missing field, an id, time, rating or text of another type, an argument out of range, and where no
    interaction is left.
    """
    if reviews_per_item < 0:
        raise InputError(f"{reviews_per_item} is less than 0", field="--reviews-per-item")
    if minimum_rating is not None and not 1 <= minimum_rating <= _LARGEST_RATING:
        raise InputError(f"{minimum_rating} is not a number from 1 to {_LARGEST_RATING}", field="--minimum-rating")
    release = RELEASES[year]
    metadata_lines = JsonLines(metadata, python_literals=release.python_literals)
    review_lines = JsonLines(reviews)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder cannot be made ({error.strerror})", file=output) from error
    counts = AmazonCounts()
    with tempfile.TemporaryDirectory(dir=output, prefix="unfinished-") as folder:
        work = Path(folder)
        earliest = EarliestReviews(work, reviews_per_item) if reviews_per_item else None
        staged = work / "staged.parquet"
        rows, untitled = _stage_items(_of_release(metadata_lines, release, "metadata"), release, staged, counts)
        interacted = _write_interactions(
            _of_release(review_lines, release, "reviews"), release, work / _INTERACTIONS, counts,
            rows=rows, untitled=untitled, minimum_rating=minimum_rating, earliest=earliest,
        )  # fmt: skip
        if not counts.interactions:
            dropped = "; ".join(line for line in counts.lines() if line.startswith("reviews"))
            raise InputError(
                f"no interaction is left ({dropped})", file=reviews,
                remedy="Give the metadata of the same category, or a lower --minimum-rating.",
            )  # fmt: skip
        _write_items(staged, work / _ITEMS, counts, interacted=interacted, earliest=earliest)
        (output / _INTERACTIONS).unlink(missing_ok=True)
        os.replace(work / _ITEMS, output / _ITEMS)
        os.replace(work / _INTERACTIONS, output / _INTERACTIONS)
    return counts


def _of_release(records: JsonLines, release: Release, kind: Kind) -> Iterator[Record]:
    """The records, refused where a line shows another kind or year; after one that shows the right ones, unchecked."""
    known = False
    for record in records:
        if not known:
            found = next((found for fields, *found in _SIGNATURES if fields <= record.values.keys()), None)
            if found is not None and found != [kind, release.year]:
                raise record.error(
                    f"this looks like {found[0]} of amazon-{found[1]}, not {kind} of amazon-{release.year}",
                    remedy=f"Give {kind} of {release.year} or use the command of the year that fits.",
                )
            known = found is not None
        yield record


def _stage_items(
    records: Iterator[Record], release: Release, path: Path, counts: AmazonCounts
) -> tuple[dict[str, int], set[str]]:
    """Write the items with a title to `path`; returns the row of each there, and the ids of items without a title."""
    rows: dict[str, int] = {}
    untitled: set[str] = set()
    with _RowGroups(path, _STAGED_SCHEMA, _ITEM_GROUP_ROWS) as table:
        for record in records:
            counts.metadata_read += 1
            item_id = record.identifier(release.item)
            if item_id in rows:
                counts.metadata_repeated += 1
                continue
            raw_title = " ".join(record.texts("title"))
            is_script = _SCRIPT_TITLE in raw_title
            title = "" if is_script else clean_text(raw_title)
            if not title:
                counts.metadata_with_script_for_title += is_script
                counts.metadata_without_title += not is_script
                untitled.add(item_id)
                continue
            untitled.discard(item_id)
            rows[item_id] = len(rows)
            description = " ".join(text for field in release.description for text in record.texts(field))
            categories = dict.fromkeys(clean_text(name) for name in record.texts(release.categories))
            brand = clean_text(" ".join(record.texts(release.brand)))
            table.append((item_id, title, clean_text(description), [name for name in categories if name], brand))
    return rows, untitled


def _write_interactions(
    records: Iterator[Record],
    release: Release,
    path: Path,
    counts: AmazonCounts,
    *,
    rows: dict[str, int],
    untitled: set[str],
    minimum_rating: float | None,
    earliest: EarliestReviews | None,
) -> bytearray:
    """Write the interactions to `path` and hand their texts on; returns 1 for each row that has interactions."""
    interacted = bytearray(len(rows))
    users: set[str] = set()
    items_without_metadata: set[str] = set()
    items_without_title: set[str] = set()
    with _RowGroups(path, _INTERACTION_SCHEMA, _INTERACTION_GROUP_ROWS) as table:
        for record in records:
            counts.reviews_read += 1
            user_id, item_id = record.identifier(release.user), record.identifier(release.item)
            time = record.integer(release.time)
            if minimum_rating is not None and record.number(release.rating) < minimum_rating:
                counts.reviews_below_minimum_rating += 1
                continue
            row = rows.get(item_id)
            if row is None:
                if item_id in untitled:
                    counts.reviews_of_items_without_title += 1
                    items_without_title.add(item_id)
                else:
                    counts.reviews_of_items_without_metadata += 1
                    items_without_metadata.add(item_id)
                continue
            table.append((user_id, item_id, time))
            counts.interactions += 1
            users.add(user_id)
            interacted[row] = 1
            if earliest is not None:
                text = clean_text(" ".join(record.texts(release.text)))
                if len(text) >= LEAST_REVIEW_CHARACTERS:
                    earliest.add(row, time, user_id, text)
    counts.users = len(users)
    counts.items_without_metadata, counts.items_without_title = len(items_without_metadata), len(items_without_title)
    return interacted


def _write_items(
    staged: Path, path: Path, counts: AmazonCounts, *, interacted: bytearray, earliest: EarliestReviews | None
) -> None:
    """Write the staged items that have interactions to `path`, with their reviews."""
    reviewed = earliest.by_item() if earliest is not None else iter(())
    upcoming = next(reviewed, None)
    row = 0
    with pq.ParquetFile(staged) as file, _RowGroups(path, _ITEM_SCHEMA, _ITEM_GROUP_ROWS) as table:
        for batch in file.iter_batches(batch_size=_ITEM_GROUP_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                reviews: list[dict[str, Any]] = []
                if upcoming is not None and upcoming[0] == row:
                    reviews = [{"user_id": review.user_id, "text": review.text} for review in upcoming[1]]
                    upcoming = next(reviewed, None)
                if interacted[row]:
                    table.append((*values, reviews))
                    counts.items += 1
                    counts.items_with_reviews += bool(reviews)
                    counts.review_texts += len(reviews)
                    counts.blank_descriptions += not values[_STAGED_SCHEMA.get_field_index("description")]
                row += 1
    counts.items_without_interactions = len(interacted) - counts.items


class _RowGroups:
    """A Parquet file that is written row by row, with a row group in memory."""

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int) -> None:
        self._writer = pq.ParquetWriter(path, schema)
        self._schema, self._group_rows = schema, group_rows
        self._rows: list[Sequence[Any]] = []

    def __enter__(self) -> _RowGroups:
        return self

    def append(self, row: Sequence[Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == self._group_rows:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows = []
