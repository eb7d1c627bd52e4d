from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from item_index.catalogue import Catalogue, Review
from item_index.input_error import InputError


def write_items(folder: Path, columns: dict[str, Any]) -> Path:
    path = folder / "items.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def load_error(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        Catalogue.load(path)
    assert caught.value.file == str(path)
    assert str(caught.value).startswith(str(path))
    return caught.value


def test_input_error_says_what_where_and_what_to_do() -> None:
    error = InputError("value is null", file="items.parquet", row=3, field="item_id", remedy="Give every item an id.")
    assert str(error) == "items.parquet, row 3, field 'item_id': value is null. Give every item an id."
    assert str(InputError("no levels.")) == "no levels."
    assert str(InputError("too small", field="seed")) == "field 'seed': too small."


def test_input_error_reads_the_same_after_a_trip_between_processes() -> None:
    error = InputError("value is null", file=Path("items.parquet"), row=0, field="title", remedy="Name it.")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.row, copy.field, copy.file) == (0, "title", "items.parquet")


def test_only_id_and_title_are_needed(tmp_path: Path) -> None:
    catalogue = Catalogue.load(write_items(tmp_path, {"item_id": [7, 3], "title": ["Chess", "Go"]}))
    assert catalogue.item_ids == (7, 3)
    assert catalogue.rows == {7: 0, 3: 1}
    assert catalogue.descriptions == ("", "")
    assert catalogue.categories == ((), ())
    assert catalogue.brands == ("", "")
    assert catalogue.reviews == ((), ())
    assert len(catalogue) == 2


def test_all_columns_are_read_and_others_are_left_alone(tmp_path: Path) -> None:
    columns = {
        "item_id": ["x", "y", "z"],
        "title": ["Chess", "Go", "Risk"],
        "description": ["A board.", None, ""],
        "categories": pa.array([["Board", " Old "], None, []], pa.list_(pa.string())),
        "brand": [None, "Stones", "War"],
        "colours": [[1], [2], [3]],
    }
    catalogue = Catalogue.load(write_items(tmp_path, columns))
    assert catalogue.item_ids == ("x", "y", "z")
    assert catalogue.descriptions == ("A board.", "", "")
    assert catalogue.categories == (("Board", "Old"), (), ())
    assert catalogue.brands == ("", "Stones", "War")


def test_categories_may_be_one_separated_string(tmp_path: Path) -> None:
    columns = {"item_id": [1, 2, 3], "title": list("abc"), "categories": ["Board | Old|", "", None]}
    assert Catalogue.load(write_items(tmp_path, columns)).categories == (("Board", "Old"), (), ())


def test_dictionary_encoded_and_large_strings_are_read(tmp_path: Path) -> None:
    columns = {
        "item_id": pa.array(["x", "y"]).dictionary_encode(),
        "title": pa.array(["Chess", "Go"], pa.large_string()),
    }
    catalogue = Catalogue.load(write_items(tmp_path, columns))
    assert catalogue.item_ids == ("x", "y")
    assert catalogue.titles == ("Chess", "Go")


def test_select_keeps_the_given_order(tmp_path: Path) -> None:
    columns = {"item_id": [1, 2, 3], "title": list("abc"), "brand": list("xyz")}
    chosen = Catalogue.load(write_items(tmp_path, columns)).select(np.array([2, 0]))
    assert chosen.item_ids == (3, 1)
    assert chosen.titles == ("c", "a")
    assert chosen.brands == ("z", "x")
    assert chosen.rows == {3: 0, 1: 1}


REVIEWS = pa.list_(pa.struct({"user_id": pa.int64(), "text": pa.string()}))


def test_reviews_are_read_and_follow_their_items(tmp_path: Path) -> None:
    lists = [[{"user_id": 5, "text": "Dry."}, {"user_id": 6, "text": ""}], None, []]
    columns = {"item_id": [1, 2, 3], "title": list("abc"), "reviews": pa.array(lists, REVIEWS)}
    catalogue = Catalogue.load(write_items(tmp_path, columns))
    assert catalogue.reviews == ((Review(5, "Dry."), Review(6, "")), (), ())
    assert catalogue.select(np.array([1, 0])).reviews == (catalogue.reviews[1], catalogue.reviews[0])


def test_a_column_of_nulls_holds_no_reviews(tmp_path: Path) -> None:
    columns = {"item_id": [1], "title": ["a"], "reviews": pa.nulls(1)}
    assert Catalogue.load(write_items(tmp_path, columns)).reviews == ((),)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in load_error(tmp_path / "items.parquet").problem


def test_file_that_is_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    path.write_text("item_id,title\n1,Chess\n")
    assert "Parquet" in load_error(path).problem


def test_file_without_rows(tmp_path: Path) -> None:
    columns = {"item_id": pa.array([], pa.int64()), "title": pa.array([], pa.string())}
    assert "no rows" in load_error(write_items(tmp_path, columns)).problem


@pytest.mark.parametrize("missing", ["item_id", "title"])
def test_missing_column(tmp_path: Path, missing: str) -> None:
    columns: dict[str, list] = {"item_id": [1], "title": ["Chess"]}
    del columns[missing]
    assert load_error(write_items(tmp_path, columns)).field == missing


@pytest.mark.parametrize(
    ("columns", "row", "field", "problem"),
    [
        ({"item_id": [1, None], "title": ["a", "b"]}, 1, "item_id", "null"),
        ({"item_id": pa.nulls(2), "title": ["a", "b"]}, 0, "item_id", "null"),
        ({"item_id": ["p", "q", "r", "q"], "title": list("abcd")}, 3, "item_id", "'q' is already taken by row 1"),
        ({"item_id": [1, 2], "title": ["a", None]}, 1, "title", "null"),
        ({"item_id": [1, 2, 3], "title": ["a", "b", " \n"]}, 2, "title", "empty"),
        ({"item_id": [1.0, 2.0], "title": ["a", "b"]}, None, "item_id", "double"),
        ({"item_id": [1, 2], "title": [5, 6]}, None, "title", "int64"),
        ({"item_id": [1], "title": ["a"], "description": [2.5]}, None, "description", "double"),
        ({"item_id": [1], "title": ["a"], "brand": [4]}, None, "brand", "int64"),
        ({"item_id": [1], "title": ["a"], "categories": [4]}, None, "categories", "int64"),
        ({"item_id": [1], "title": ["a"], "categories": [[4]]}, None, "categories", "int64"),
        ({"item_id": [1, 2], "title": ["a", "b"], "categories": [["c"], [None]]}, 1, "categories", "null"),
        ({"item_id": [1], "title": ["a"], "reviews": [["good"]]}, None, "reviews", "list<element: string>"),
        ({"item_id": [1], "title": ["a"], "reviews": ["good"]}, None, "reviews", "string"),
        ({"item_id": [1], "title": ["a"], "reviews": [[{"user_id": 1}]]}, None, "reviews", "struct"),
        ({"item_id": [1], "title": ["a"], "reviews": [[{"user_id": 1.5, "text": "b"}]]}, None, "reviews", "double"),
        ({"item_id": [1], "title": ["a"], "reviews": [[{"user_id": 1, "text": 2}]]}, None, "reviews", "text: int64"),
        (
            {"item_id": [1, 2], "title": ["a", "b"],
             "reviews": [[], [{"user_id": 1, "text": "b"}, {"user_id": None, "text": "c"}]]},
            1, "reviews", "review 1 of the list has no user_id",
        ),
        (
            {"item_id": [1, 2], "title": ["a", "b"], "reviews": [[{"user_id": 1, "text": "b"}], [None]]},
            1, "reviews", "review 0 of the list has no user_id and no text",
        ),
        ({"item_id": pa.array([1, 2**63], pa.uint64()), "title": ["a", "b"]}, 1, "item_id", "too large"),
    ],
)  # fmt: skip
def test_bad_values_are_named(
    tmp_path: Path, columns: dict[str, Any], row: int | None, field: str, problem: str
) -> None:
    error = load_error(write_items(tmp_path, columns))
    assert error.row == row
    assert error.field == field
    assert problem in error.problem
