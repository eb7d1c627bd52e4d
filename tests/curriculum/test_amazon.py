from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from curriculum import amazon
from curriculum.amazon import AmazonCounts, convert_amazon
from curriculum.earliest_reviews import EarliestReviews
from curriculum.interactions import build_sequences, load_interactions
from item_index.catalogue import Catalogue, Review
from item_index.fusion import item_prompt
from item_index.input_error import InputError

Lines = list[dict[str, Any]]
LONG = "long enough to be of use"


def review(year: int, user: str, item: str, time: int, text: str | None = LONG, stars: float = 5.0) -> dict[str, Any]:
    """A line of the review file as the collection has it."""
    if year == 2023:
        return {
            "rating": stars, "title": "ok", "text": text, "images": [], "asin": f"child-of-{item}", "parent_asin": item,
            "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True,
        }  # fmt: skip
    line = {
        "overall": stars, "reviewTime": "07 14, 2014", "reviewerID": user, "asin": item, "reviewerName": "A. Reader",
        "reviewText": text, "summary": "ok", "unixReviewTime": time,
    }  # fmt: skip
    line |= {"helpful": [0, 0]} if year == 2014 else {"verified": True, "vote": "1,234", "style": {"Size:": " 7 oz"}}
    return line if text is not None else {name: value for name, value in line.items() if name != "reviewText"}


METADATA: dict[int, Lines] = {
    2014: [
        {
            "asin": "0001", "title": "Moss &amp; Fern", "description": "It's <b>green</b>.", "brand": "Fern & Co",
            "categories": [["Home", "Garden"], ["Garden", "Moss &amp; more"]], "price": 3.5, "imUrl": "http://x",
            "salesRank": {"Garden": 3}, "related": {"also_bought": ["0002"]},
        },
        {"asin": "0002", "title": "Tide Tables", "categories": [[]]},
        {"asin": "0003", "imUrl": "http://x", "categories": [["Garden"]]},
    ],
    2018: [
        {
            "category": ["Home", "Garden", "</span></span></span>", "Moss &amp; more"], "tech1": "", "also_buy": [],
            "description": ["It's <b>green</b>.", ""], "title": "Moss &amp; <span>Fern</span>", "feature": ["light"],
            "brand": "\n    Fern & Co\n", "rank": "3 in Garden (", "main_cat": "Garden", "asin": "0001", "image": [],
        },
        {"category": [], "description": [], "title": "Tide Tables", "brand": "", "asin": "0002"},
        {"category": [], "title": "var aPageStart = (new Date()).getTime();\nvar ue_t0=1;", "asin": "0003"},
    ],
    2023: [
        {
            "main_category": "Garden", "title": "Moss &amp; Fern", "average_rating": 4.5, "rating_number": 3,
            "features": ["It's green."], "description": [], "price": None, "images": [], "videos": [],
            "store": "Fern & Co", "categories": ["Home", "Garden", "Moss &amp; more"], "details": {"a": "b"},
            "parent_asin": "0001", "bought_together": None,
        },
        {"title": "Tide Tables", "features": [], "description": [], "store": None, "categories": [],
         "parent_asin": "0002"},
        {"title": None, "features": [], "description": ["x"], "store": None, "parent_asin": "0003"},
    ],
}  # fmt: skip


def reviews_of(year: int) -> Lines:
    unit = 1000 if year == 2023 else 1
    return [
        review(year, "ann", "0001", 300 * unit, "Ann found it &quot;lovely&quot;<br />and green."),
        review(year, "bob", "0001", 100 * unit, "too short", stars=2.0),
        review(year, "bob", "0002", 200 * unit, None, stars=4.0),
        review(year, "ann", "0003", 250 * unit),
        review(year, "cat", "0009", 260 * unit),
        review(year, "cat", "0001", 250 * unit, "Cat found it not so lovely \ud83d", stars=1.0),
    ]


def json_lines(path: Path, lines: Lines) -> Path:
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def convert(folder: Path, year: int, reviews: Lines, metadata: Lines | None = None, **options: Any) -> AmazonCounts:
    return convert_amazon(
        year,
        reviews=json_lines(folder / "reviews.json", reviews),
        metadata=json_lines(folder / "meta.json", METADATA[year] if metadata is None else metadata),
        output=folder / "out",
        **options,
    )


def items(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "out" / "items.parquet").to_pylist()


def interactions(folder: Path) -> list[tuple[Any, ...]]:
    table = pq.read_table(folder / "out" / "interactions.parquet")
    assert table.column_names == ["user_id", "item_id", "timestamp"]
    return list(zip(*table.to_pydict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_each_collection_becomes_the_same_tables(tmp_path: Path, year: int, suffix: str) -> None:
    reviews = json_lines(tmp_path / f"reviews{suffix}", reviews_of(year))
    metadata = json_lines(tmp_path / f"meta{suffix}", METADATA[year])
    if year == 2014:  # as it was published: Python literals
        content = "".join(f"{line!r}\n" for line in METADATA[year]).encode()
        metadata.write_bytes(gzip.compress(content) if suffix == ".json.gz" else content)
    counts = convert_amazon(year, reviews=reviews, metadata=metadata, output=tmp_path / "out")
    unit = 1000 if year == 2023 else 1
    assert items(tmp_path) == [
        {
            "item_id": "0001", "title": "Moss & Fern", "description": "It's green.",
            "categories": ["Home", "Garden", "Moss & more"], "brand": "Fern & Co",
            "reviews": [
                {"user_id": "cat", "text": "Cat found it not so lovely \ufffd"},
                {"user_id": "ann", "text": 'Ann found it "lovely" and green.'},
            ],
        },
        {"item_id": "0002", "title": "Tide Tables", "description": "", "categories": [], "brand": "", "reviews": []},
    ]  # fmt: skip
    assert interactions(tmp_path) == [
        ("ann", "0001", 300 * unit), ("bob", "0001", 100 * unit), ("bob", "0002", 200 * unit),
        ("cat", "0001", 250 * unit),
    ]  # fmt: skip
    script = year == 2018
    assert counts == AmazonCounts(
        metadata_read=3, metadata_with_script_for_title=int(script), metadata_without_title=int(not script),
        reviews_read=6, reviews_of_items_without_metadata=1, reviews_of_items_without_title=1,
        items_without_metadata=1, items_without_title=1, users=3, items=2, interactions=4, items_with_reviews=1,
        review_texts=2, blank_descriptions=1,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["interactions.parquet", "items.parquet"]


def test_metadata_of_2014_may_be_strict_json(tmp_path: Path) -> None:
    assert convert(tmp_path, 2014, reviews_of(2014)).items == 2
    assert items(tmp_path)[0]["title"] == "Moss & Fern"


def test_repeated_metadata_and_items_nobody_reviewed(tmp_path: Path) -> None:
    metadata = [
        {"asin": "a", "category": [], "title": "<b></b>"},
        {"asin": "b", "category": [], "title": "Not reviewed"},
        {"asin": "a", "category": [], "title": "The first title"},
        {"asin": "a", "category": [], "title": "A second title"},
    ]
    counts = convert(tmp_path, 2018, [review(2018, "ann", "a", 1)], metadata)
    assert [(item["item_id"], item["title"]) for item in items(tmp_path)] == [("a", "The first title")]
    assert (counts.metadata_repeated, counts.metadata_without_title, counts.items_without_interactions) == (1, 1, 1)
    assert (counts.items_without_title, counts.reviews_of_items_without_title) == (0, 0)


def test_description_of_2023_ends_with_the_bullet_points(tmp_path: Path) -> None:
    metadata = [{"parent_asin": "a", "title": "A", "description": ["One.", "Two."], "features": ["Three", "four"]}]
    convert(tmp_path, 2023, [review(2023, "ann", "a", 1)], metadata)
    assert items(tmp_path)[0]["description"] == "One. Two. Three four"


def test_minimum_rating_drops_interactions_and_texts(tmp_path: Path) -> None:
    counts = convert(tmp_path, 2014, reviews_of(2014), minimum_rating=4.0)
    assert [(user, item) for user, item, _ in interactions(tmp_path)] == [("ann", "0001"), ("bob", "0002")]
    assert [[text["user_id"] for text in item["reviews"]] for item in items(tmp_path)] == [["ann"], []]
    assert (counts.reviews_below_minimum_rating, counts.interactions) == (2, 2)


def test_reviews_kept_are_the_earliest_whatever_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        review(2018, f"u{user}", f"000{item}", user % 4, f"{LONG} {user}") for user in range(30) for item in (1, 2)
    ]
    expected = [f"u{user}" for user in sorted(range(30), key=lambda user: (user % 4, f"u{user}"))[:9]]
    found = []
    for name, characters in (("in_memory", 1 << 28), ("in_runs", 2_000)):
        monkeypatch.setitem(EarliestReviews.__init__.__kwdefaults__, "characters_in_memory", characters)
        (tmp_path / name).mkdir()
        convert(tmp_path / name, 2018, random.Random(characters).sample(lines, len(lines)), reviews_per_item=9)
        found.append(items(tmp_path / name))
        assert [[text["user_id"] for text in item["reviews"]] for item in found[-1]] == [expected, expected]
    assert found[0] == found[1]
    counts = convert(tmp_path, 2018, lines, reviews_per_item=0)
    assert (counts.review_texts, [item["reviews"] for item in items(tmp_path)]) == (0, [[], []])


def test_many_row_groups_hold_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = [{"asin": f"i{item}", "categories": [["x"]], "title": f"Item {item}"} for item in range(11)]
    lines = [review(2014, f"u{user}", f"i{item}", 50 - user) for user in range(5) for item in range(0, 11, 2)]
    convert(tmp_path, 2014, lines, metadata)
    whole = items(tmp_path), interactions(tmp_path)
    monkeypatch.setattr(amazon, "_ITEM_GROUP_ROWS", 3)
    monkeypatch.setattr(amazon, "_INTERACTION_GROUP_ROWS", 7)
    convert(tmp_path, 2014, lines, metadata)
    assert (items(tmp_path), interactions(tmp_path)) == whole
    assert pq.ParquetFile(tmp_path / "out" / "interactions.parquet").metadata.num_row_groups == 5
    assert pq.ParquetFile(tmp_path / "out" / "items.parquet").metadata.num_row_groups == 2
    assert [item["item_id"] for item in whole[0]] == [f"i{item}" for item in range(0, 11, 2)]
    assert {len(item["reviews"]) for item in whole[0]} == {5}


@pytest.mark.parametrize("given", [2014, 2018, 2023])
@pytest.mark.parametrize("wanted", [2014, 2018, 2023])
def test_files_of_another_year_or_swapped_are_recognised(tmp_path: Path, wanted: int, given: int) -> None:
    reviews, metadata = reviews_of(given), METADATA[given]
    with pytest.raises(InputError, match=rf"meta\.json, line 1: .*looks like reviews of amazon-{given}, not metadata"):
        convert(tmp_path, wanted, metadata, reviews)
    if wanted == given:
        return
    with pytest.raises(InputError, match=rf"meta\.json, line 1: .*metadata of amazon-{given}, not .*amazon-{wanted}"):
        convert(tmp_path, wanted, reviews_of(wanted), metadata)
    with pytest.raises(InputError, match=rf"reviews\.json, line 1: .*reviews of amazon-{given}, not .*amazon-{wanted}"):
        convert(tmp_path, wanted, reviews)


def test_a_line_that_shows_the_year_counts_where_the_first_does_not(tmp_path: Path) -> None:
    metadata = [{"asin": "0000", "title": "Sparse"}, *METADATA[2014]]
    with pytest.raises(
        InputError, match=r"line 2: this looks like metadata of amazon-2014, not metadata of amazon-201"
    ):
        convert(tmp_path, 2018, reviews_of(2018), metadata)


FAULTS = {
    "user": (2014, {"reviewerID": None}, "line 2, field 'reviewerID': None is not an id"),
    "item": (2018, {"asin": 17}, "line 2, field 'asin': 17 is not an id"),
    "time as text": (2014, {"unixReviewTime": "1"}, "line 2, field 'unixReviewTime': '1' is not a whole number"),
    "time with a fraction": (2023, {"timestamp": 1.5}, "line 2, field 'timestamp': 1.5 is not a whole number"),
    "rating": (2018, {"overall": "five"}, "line 2, field 'overall': 'five' is not a number"),
    "text": (2023, {"text": 3}, "line 2, field 'text': 3 is not text"),
    "missing": (2023, {"parent_asin": ...}, "line 2, field 'parent_asin': the field is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_fields_are_named_and_leave_old_tables_alone(tmp_path: Path, fault: str) -> None:
    year, change, message = FAULTS[fault]
    convert(tmp_path, year, reviews_of(year), reviews_per_item=1)
    before = items(tmp_path), interactions(tmp_path)
    broken = {name: value for name, value in (reviews_of(year)[0] | change).items() if value is not ...}
    with pytest.raises(InputError, match=rf"reviews\.json, {message}"):
        convert(tmp_path, year, [reviews_of(year)[0], broken], minimum_rating=1)
    assert (items(tmp_path), interactions(tmp_path)) == before
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_failed_conversion_leaves_no_table(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{'asin': 'a', 'title': 'A'}\n{'asin': 'b', 'title': f'B'}\n")
    json_lines(tmp_path / "reviews.json", [review(2014, "ann", "a", 1)])
    with pytest.raises(InputError, match=r"meta\.json, line 2: .*Python dict literal"):
        convert_amazon(
            2014, reviews=tmp_path / "reviews.json", metadata=tmp_path / "meta.json", output=tmp_path / "out"
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_an_end_between_the_two_tables_leaves_no_pair_of_different_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tmp_path, 2014, reviews_of(2014))
    replace = os.replace

    def replace_items_only(source: Path, target: Path) -> None:
        if target.name == "interactions.parquet":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_items_only)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, 2014, [review(2014, "ann", "0002", 1)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["items.parquet"]


def test_no_interaction_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no interaction is left .*reviews of items without metadata: 1"):
        convert(tmp_path, 2014, [review(2014, "ann", "0009", 1)])
    with pytest.raises(InputError, match=r"no interaction is left .*reviews below minimum rating: 1"):
        convert(tmp_path, 2014, [review(2014, "ann", "0001", 1, stars=1.0)], minimum_rating=2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "field"),
    [({"minimum_rating": float("nan")}, "--minimum-rating"), ({"minimum_rating": 6}, "--minimum-rating"),
     ({"reviews_per_item": -1}, "--reviews-per-item")],
)  # fmt: skip
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        convert(tmp_path, 2014, reviews_of(2014), **options)


def test_tables_fit_loading_splitting_and_fusion(tmp_path: Path) -> None:
    """Six users and six items in a ring: after leave-one-out the fusion may read train reviews, and no others."""
    metadata = [{"parent_asin": f"i{item}", "title": f"Item {item}", "features": []} for item in range(7)]
    lines = [
        review(2023, f"u{user}", f"i{(user + place) % 6}", 1_600_000_000_000 + place, f"{LONG}, says u{user}")
        for user in range(6)
        for place in range(5)
    ]
    again = review(2023, "u0", "i0", 1_700_000_000_000, "bought a second time, as good as ever")
    alone = review(2023, "u6", "i6", 5)
    convert(tmp_path, 2023, [*lines, again, alone], metadata)
    catalogue = Catalogue.load(tmp_path / "out" / "items.parquet")
    assert catalogue.reviews[6] == (Review("u6", LONG),)
    loaded = load_interactions(tmp_path / "out" / "interactions.parquet", catalogue)
    kept, sequences = build_sequences(loaded, catalogue, minimum_interactions=5)
    assert kept.item_ids == tuple(f"i{item}" for item in range(6))
    assert sequences.user_ids == tuple(f"u{user}" for user in range(6))
    assert [[kept.item_ids[item] for item in sequences.sequence(user)] for user in range(6)] == [
        [f"i{(user + place) % 6}" for place in range(5)] for user in range(6)
    ]
    prompt = item_prompt(kept, 0, sequences.trains_on)
    assert prompt is not None
    # i0 is in the train part of u0, u5 and u4, the validation target of u3 and the test target of u2.
    assert [user for user in range(6) if f"says u{user}" in prompt] == [0, 4, 5]
    assert "second time" not in prompt


def gream(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gream", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_writes_and_prints_all_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for year in (2014, 2018, 2023):
        reviews = json_lines(tmp_path / "r.json.gz", reviews_of(year))
        metadata = json_lines(tmp_path / "m.json.gz", METADATA[year])
        arguments = [f"amazon-{year}", "--reviews", reviews, "--metadata", metadata, "--output", tmp_path / "out"]
        options = ["--minimum-rating", "2", "--reviews-per-item", "4"]
        assert gream(monkeypatch, *arguments, *options) == 0
        printed = capsys.readouterr().out
        for line in ("reviews below minimum rating: 1", "users: 2", "items: 2", "interactions: 3", "review texts: 1"):
            assert f"data: {line}\n" in printed
        assert len(interactions(tmp_path)) == 3
    monkeypatch.chdir(tmp_path)
    assert gream(monkeypatch, *arguments[:-2]) == 0
    assert (tmp_path / "data" / "amazon-2023" / "items.parquet").exists()


def test_the_command_ends_bad_input_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = json_lines(tmp_path / "m.json", METADATA[2014])
    arguments = ["amazon-2014", "--metadata", metadata, "--output", tmp_path / "out", "--reviews"]
    assert gream(monkeypatch, *arguments, tmp_path / "r.json") == 2
    assert capsys.readouterr().err == (
        f"gream: {tmp_path / 'r.json'}: the file does not exist. Give the path of the download.\n"
    )
    assert not (tmp_path / "out").exists()
