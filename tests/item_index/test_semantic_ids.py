from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex, assign_semantic_ids

CODES = np.array([[0, 1], [2, 0], [0, 1], [1, 1], [0, 1]])


def index_of(codes: np.ndarray = CODES, spare: int = 8, **arguments: list[np.ndarray]) -> SemanticIdIndex:
    return assign_semantic_ids(
        [f"item{row}" for row in range(len(codes))], codes, (3, 2), spare_collision_codes=spare, **arguments
    )


def test_all_items_that_collide_get_an_ordinal() -> None:
    index = index_of(spare=2)
    np.testing.assert_array_equal(index.codes_IL, [[0, 1, 0], [2, 0, -1], [0, 1, 1], [1, 1, -1], [0, 1, 2]])
    assert index.codes_IL.dtype == np.int32
    assert index.lengths_I.tolist() == [3, 2, 3, 2, 3]
    assert (index.levels, index.depth, index.collision_size, len(index)) == (2, 3, 5, 5)


def test_without_collisions_only_spare_codes_are_kept() -> None:
    index = index_of(CODES[1:4])
    assert (index.depth, index.collision_size) == (2, 8)
    assert index.codes_IL.shape == (3, 2)
    assert len(index.tokens()) == 3
    bare = index_of(CODES[1:4], spare=0)
    assert bare.collision_size == 0
    assert len(bare.tokens()) == 2


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=30))
def test_every_item_has_an_id_of_its_own(rows: list[tuple[int, int]]) -> None:
    index = index_of(np.array(rows))
    texts = [index.text(row) for row in range(len(rows))]
    assert len(set(texts)) == len(rows)
    counts, seen = Counter(rows), Counter[tuple[int, int]]()
    for row, codes in enumerate(rows):
        ordinal = [seen[codes]] if counts[codes] > 1 else []
        assert index.codes_IL[row, : index.lengths_I[row]].tolist() == [*codes, *ordinal]
        seen[codes] += 1


def test_tokens_and_text() -> None:
    index = index_of(spare=1)
    assert index.token(0, 2) == "<|a_2|>"
    assert index.tokens() == [
        ["<|a_0|>", "<|a_1|>", "<|a_2|>"],
        ["<|b_0|>", "<|b_1|>"],
        ["<|c_0|>", "<|c_1|>", "<|c_2|>", "<|c_3|>"],
    ]
    assert index.text(4) == "<|a_0|><|b_1|><|c_2|>"
    assert index.text(3) == "<|a_1|><|b_1|>"


@pytest.mark.parametrize(("level", "code"), [(0, 3), (2, 11), (3, 0), (-1, 0), (0, -1)])
def test_codes_outside_a_level_have_no_token(level: int, code: int) -> None:
    with pytest.raises(ValueError, match="no code"):
        index_of().token(level, code)


def test_version_follows_the_content() -> None:
    version = index_of().version
    assert len(version) == 16
    assert index_of().version == version
    assert index_of(codebooks=[np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)]).version == version
    changed = CODES.copy()
    changed[1] = [2, 1]
    others = {
        index_of(changed).version,
        index_of(spare=9).version,
        assign_semantic_ids(list("abcde"), CODES, (3, 2)).version,
        assign_semantic_ids(range(5), CODES, (3, 2)).version,
        assign_semantic_ids([f"item{row}" for row in range(5)], CODES, (4, 2)).version,
    }
    assert len(others | {version}) == 6


@pytest.mark.parametrize("item_ids", [list(range(10, 15)), list("vwxyz")])
def test_saved_and_loaded_is_the_same(tmp_path: Path, item_ids: list[str | int]) -> None:
    codebooks = [np.full((3, 4), 0.5, np.float32), np.arange(8, dtype=np.float32).reshape(2, 4)]
    index = assign_semantic_ids(item_ids, CODES, (3, 2), codebooks=codebooks)
    index.save(tmp_path / "index")
    loaded = SemanticIdIndex.load(tmp_path / "index")
    assert loaded.version == index.version
    assert loaded.item_ids == tuple(item_ids)
    assert (loaded.level_sizes, loaded.collision_size) == ((3, 2), index.collision_size)
    np.testing.assert_array_equal(loaded.codes_IL, index.codes_IL)
    np.testing.assert_array_equal(loaded.lengths_I, index.lengths_I)
    assert (loaded.codes_IL.dtype, loaded.lengths_I.dtype) == (np.int32, np.int32)
    assert loaded.codebooks is not None
    for read, written in zip(loaded.codebooks, codebooks, strict=True):
        np.testing.assert_array_equal(read, written)


def test_writing_again_without_codebooks_leaves_none(tmp_path: Path) -> None:
    saved(tmp_path)
    index_of().save(tmp_path)  # the same content, so the same version
    index = SemanticIdIndex.load(tmp_path)
    assert index.codebooks is None
    assert sorted(path.name for path in folder_of(tmp_path, index.version).iterdir()) == [
        "manifest.json", "semantic_ids.parquet", "trie.safetensors",
    ]  # fmt: skip


def test_a_write_that_is_cut_short_leaves_the_current_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_of()
    first.save(tmp_path)

    def full_disk(*_arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("item_index.trie.ItemTrie.save", full_disk)
    with pytest.raises(OSError, match="no space"):
        index_of(CODES[1:4]).save(tmp_path)
    assert SemanticIdIndex.load(tmp_path).version == first.version


def folder_of(folder: Path, version: str) -> Path:
    return folder / "versions" / version


def saved(folder: Path) -> Path:
    """Saves an index with codebooks; returns the folder of its version."""
    index = index_of(codebooks=[np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)])
    index.save(folder)
    return folder_of(folder, index.version)


def load_error(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        SemanticIdIndex.load(folder)
    return caught.value


@pytest.mark.parametrize("name", ["semantic_ids.parquet", "codebooks.safetensors", "trie.safetensors"])
def test_changed_or_missing_files_are_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = load_error(tmp_path)
    assert error.file == str(path)
    assert "SHA-256" in error.problem
    path.unlink()
    error = load_error(tmp_path)
    assert error.file == str(path)
    assert "lacks" in error.problem


def test_bad_manifests_are_refused(tmp_path: Path) -> None:
    assert load_error(tmp_path).file == str(tmp_path / "current.json")
    path = saved(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.unlink()
    assert load_error(tmp_path).file == str(path)
    for content in ("{", "[]"):
        path.write_text(content)
        assert "JSON" in load_error(tmp_path).problem
    path.write_text(json.dumps({**manifest, "format_version": 99}))
    assert load_error(tmp_path).field == "format_version"
    path.write_text(json.dumps({**manifest, "collision_size": 5}))
    assert load_error(tmp_path).field == "version"
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "sha256"}))
    assert "lacks sha256" in load_error(tmp_path).problem
    path.write_text(json.dumps({**manifest, "sha256": {}}))
    assert "lacks the hash of a file" in load_error(tmp_path).problem
    path.write_text(json.dumps(manifest))
    (tmp_path / "current.json").write_text('{"version": "0"}')
    assert manifest["version"] in load_error(tmp_path).problem


def test_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        assign_semantic_ids([1, 1], CODES[:2], (3, 2))
    with pytest.raises(ValueError, match="2 levels"):
        assign_semantic_ids([1, 2], CODES[:2, :1], (3, 2))
    with pytest.raises(ValueError, match="level sizes"):
        assign_semantic_ids([1, 2], CODES[:2], (2, 2))
