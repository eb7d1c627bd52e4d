"""The index stage: what it leaves in its folder, with an endpoint, an encoder and the collaborative block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer, describe
from small_tables import ITEMS, interactions_table, items_table, write_tables

from cluster.index import index_stage, read_data
from cluster.settings import load_settings
from item_index.collaborative import collaborative_vectors, fuse
from item_index.embedding import LanguageModelEncoder, load_encoder
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.vectors import read_vectors


class Recorder:
    """Stands in for the tracker: MLflow takes seconds to start and has its own tests."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: dict[str, float]) -> None:
        self.values |= values


def run_index(folder: Path, *overrides: str, **tables) -> tuple[dict, Path, Recorder]:
    """The stage on the small tables: its summary, its folder, what it tracked."""
    settings = load_settings(None, [*write_tables(folder / "data", **tables), *overrides])
    output, recorder = folder / "index", Recorder()
    output.mkdir(exist_ok=True)
    return index_stage(settings, output, recorder), output, recorder  # type: ignore[arg-type]


HELD = np.array(interactions_table()["item_id"]).reshape(-1, 12)  # the items of every user, in time order below
TARGET = str(HELD[0, -1])
TARGET_ROW = int(TARGET.removeprefix("item-"))


def with_reviews() -> dict:
    """TARGET is reviewed by user 0, whose test target it is, every other item by a user who trains on it."""
    items = items_table()
    reviewers = [
        0 if item == TARGET else next(user for user, row in enumerate(HELD) if item in row[:-2])
        for item in items["item_id"]
    ]
    reviews = [
        [{"user_id": user, "text": f"What I think of {item}, at length."}]
        for user, item in zip(reviewers, items["item_id"], strict=True)
    ]
    items["reviews"] = pa.array(reviews, pa.list_(pa.struct({"user_id": pa.int64(), "text": pa.string()})))
    return {"items": items, "interactions": {**interactions_table(), "timestamp": list(range(HELD.size))}}


def test_the_stage_leaves_index_encoder_and_vectors(tmp_path: Path) -> None:
    summary, folder, recorder = run_index(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "current.json", "encoder", "settings.yaml", "vectors.parquet", "versions",
    }  # fmt: skip
    index = SemanticIdIndex.load(folder)
    item_ids, vectors = read_vectors(folder / "vectors.parquet")
    assert tuple(item_ids) == index.item_ids
    catalogue, _ = read_data(load_settings(None, write_tables(tmp_path / "data")))
    np.testing.assert_array_equal(load_encoder(folder / "encoder").encode(catalogue), vectors)
    assert summary["version"] == index.version
    assert (summary["items"], summary["dimensions"]) == (len(index), vectors.shape[1])
    assert recorder.values["index/dimensions"] == vectors.shape[1]


def test_the_collaborative_block_comes_from_train_interactions(tmp_path: Path) -> None:
    plain = read_vectors(run_index(tmp_path)[1] / "vectors.parquet")[1]
    override = ["index.collaborative_weight=2", "index.collaborative_dimensions=3"]
    summary, folder, _ = run_index(tmp_path, *override)
    catalogue, sequences = read_data(load_settings(None, write_tables(tmp_path / "data")))
    collaborative = collaborative_vectors(sequences.train_matrix(len(catalogue)), dimensions=3, seed=0)
    vectors = read_vectors(folder / "vectors.parquet")[1]
    np.testing.assert_array_equal(vectors, fuse(plain, collaborative, weight=2.0))
    assert summary["dimensions"] == plain.shape[1] + 3


def test_a_language_model_embeds(tmp_path: Path, tiny) -> None:
    _, folder, _ = run_index(
        tmp_path, "index.embedding=language_model", f"index.encoder_path={tiny.checkpoint}", "index.encoder_tokens=30"
    )
    catalogue, _ = read_data(load_settings(None, write_tables(tmp_path / "data")))
    expected = LanguageModelEncoder(tiny.checkpoint, maximum_tokens=30).encode(catalogue)
    np.testing.assert_array_equal(read_vectors(folder / "vectors.parquet")[1], expected)


def test_fused_descriptions_are_embedded_and_reviews_of_targets_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCRIBE_KEY", "s3cret")
    with ChatServer() as server:
        fusion = [f"index.fusion={{url: '{server.url}', model: scribe, key_variable: SCRIBE_KEY}}"]
        summary, folder, recorder = run_index(tmp_path, *fusion, **with_reviews())
        asked = len(server.bodies)
        again = run_index(tmp_path, *fusion, **with_reviews())[0]
        assert len(server.bodies) == asked, "the cache is in the stage's folder"
    table = pq.read_table(folder / "descriptions.parquet").to_pydict()
    others = [row for row in range(ITEMS) if row != TARGET_ROW]
    assert table["source"][TARGET_ROW] == "no usable review"
    assert {table["source"][row] for row in others} == {"cached"}
    assert table["description"][TARGET_ROW] == ""
    assert [table["description"][row] for row in others] == [describe(f"Tale number {row}", 1) for row in others]
    assert summary["text"] == {
        "fused": ITEMS - 1, "cached": 0, "no usable review": 1, "failed": 0, "torn_lines": 0, "calls": ITEMS - 1,
        "retries": 0, "prompt_tokens": 0, "completion_tokens": 0, "cached_prompt_tokens": 0,
        "cached_completion_tokens": 0,
    }  # fmt: skip
    assert again["text"]["cached"] == ITEMS - 1
    assert again["version"] == summary["version"]
    assert recorder.values["index/no_usable_review"] == 1
    assert "s3cret" not in "".join(file.read_text() for file in folder.rglob("*.json*"))
    assert "fine" in json.loads((folder / "encoder" / "terms.json").read_text())
    assert not any(f"of {TARGET}," in body["messages"][1]["content"] for body in server.bodies)
    printed = capsys.readouterr().out
    assert "descriptions: no usable review" in printed
    assert "s3cret" not in printed
    run_index(tmp_path, **with_reviews())
    assert not (folder / "descriptions.parquet").exists(), "without fusion there are none"


def test_failures_are_shown_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9/v1"
    summary, _, _ = run_index(tmp_path, f"index.fusion={{url: '{url}', model: scribe, retries: 0}}", **with_reviews())
    assert summary["text"]["failed"] == summary["text"]["failed, no connection"] == ITEMS - 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"fusion: warning: item 'item-{1 if TARGET_ROW == 0 else 0}': APIConnectionError" in printed
    assert f"{ITEMS - 1} items keep their raw description" in printed


def test_a_key_that_is_not_set_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with ChatServer() as server:
        fusion = f"index.fusion={{url: '{server.url}', model: scribe, key_variable: NO_SUCH_KEY}}"
        with pytest.raises(InputError, match="NO_SUCH_KEY is not set"):
            run_index(tmp_path, fusion, **with_reviews())
    assert not server.bodies


def test_reviewers_of_another_kind_than_users_are_refused(tmp_path: Path) -> None:
    tables = with_reviews()
    tables["interactions"]["user_id"] = [f"user-{user}" for user in tables["interactions"]["user_id"]]
    with pytest.raises(InputError, match="the interactions' like 'user-0'") as caught:
        run_index(tmp_path, "index.fusion={url: 'http://127.0.0.1:9/v1', model: scribe}", **tables)
    assert caught.value.field == "reviews"


def test_a_missing_model_folder_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with ChatServer() as server:
        fusion = f"index.fusion={{url: '{server.url}', model: scribe}}"
        with pytest.raises(InputError, match="no such model folder"):
            run_index(
                tmp_path, fusion, "index.embedding=language_model", "index.encoder_path=nowhere", **with_reviews()
            )
    assert not server.bodies


@pytest.mark.engines
@pytest.mark.usefixtures("ray_cluster")
def test_distributed_or_not_the_index_is_the_same(tmp_path: Path) -> None:
    with ChatServer() as server:
        fusion = f"index.fusion={{url: '{server.url}', model: scribe}}"
        versions = [
            run_index(tmp_path / flag, fusion, f"index.distributed={flag}", **with_reviews())[0]["version"]
            for flag in ("false", "true")
        ]
    assert versions[0] == versions[1]
    vectors = [read_vectors(tmp_path / flag / "index" / "vectors.parquet")[1] for flag in ("false", "true")]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert set(server.asked.values()) == {2}


def test_the_stage_itself_imports_neither_ray_nor_torch_nor_openai() -> None:
    code = "import sys, cluster.index; sys.exit(bool({'ray', 'torch', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0
