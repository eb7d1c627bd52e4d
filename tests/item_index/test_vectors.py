"""Vectors on disk: what was written comes back, and what is broken is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from item_index.input_error import InputError
from item_index.vectors import iterate_vectors, read_vectors, vectors_of, write_vectors


def blocks_of(vectors: np.ndarray, size: int) -> list[tuple[list[str], np.ndarray]]:
    return [
        ([f"item-{row}" for row in range(start, min(start + size, len(vectors)))], vectors[start : start + size])
        for start in range(0, len(vectors), size)
    ]


def table(values: list, width: int = 2, ids: list | None = None) -> pa.Table:
    vectors = pa.array(values, pa.list_(pa.float32(), width))
    return pa.table({"item_id": pa.array(ids or list(range(len(values)))), "vector": vectors})


@pytest.mark.parametrize("size", [1, 3, 10])
def test_what_was_written_comes_back(tmp_path: Path, size: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    write_vectors(tmp_path / "deep" / "vectors.parquet", iter(blocks_of(vectors, size)))
    item_ids, read = read_vectors(tmp_path / "deep" / "vectors.parquet")
    assert item_ids == [f"item-{row}" for row in range(10)]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, vectors)
    assert pq.ParquetFile(tmp_path / "deep" / "vectors.parquet").num_row_groups == -(-10 // size)


def test_batches_are_bounded_and_in_order(tmp_path: Path) -> None:
    vectors = np.arange(20, dtype=np.float64).reshape(10, 2)
    write_vectors(tmp_path / "v.parquet", blocks_of(vectors, 4))
    batches = list(iterate_vectors(tmp_path / "v.parquet", rows=3))
    assert max(len(ids) for ids, _ in batches) == 3
    np.testing.assert_array_equal(np.concatenate([block for _, block in batches]), vectors)
    assert [item for ids, _ in batches for item in ids] == [f"item-{row}" for row in range(10)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_not_written_and_is_named(tmp_path: Path, value: float) -> None:
    vectors = np.ones((7, 2))
    vectors[5, 1] = value
    with pytest.raises(InputError, match="'item-5'") as caught:
        write_vectors(tmp_path / "v.parquet", blocks_of(vectors, 3))
    assert (caught.value.file, caught.value.row, caught.value.field) == (str(tmp_path / "v.parquet"), 5, "vector")
    assert not (tmp_path / "v.parquet").exists()


def test_writing_that_was_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.parquet", blocks_of(np.ones((2, 2)), 2))

    def cut_short():
        yield blocks_of(np.zeros((2, 2)), 2)[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_vectors(tmp_path / "v.parquet", cut_short())
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.parquet")[1], np.ones((2, 2)))


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [(["a"], np.ones((2, 2)))],
        [(["a"], np.ones(2))],
        [(["a"], np.ones((1, 2))), (["b"], np.ones((1, 3)))],
        [(["a"], np.ones((1, 2))), ([7], np.ones((1, 2)))],
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, blocks: list) -> None:
    with pytest.raises(ValueError, match=r"no vectors|of shape|begins a block"):
        write_vectors(tmp_path / "v.parquet", blocks)


@pytest.mark.parametrize(
    ("broken", "row", "field"),
    [
        (table([[1.0, 2.0], [3.0, float("nan")]]), 1, "vector"),
        (table([[1.0, 2.0], [3.0, 4.0], [None, 1.0]]), 2, "vector"),
        (table([[1.0, 2.0], None]), None, "vector"),
        (table([[1.0, 2.0], [1.0, 2.0]], ids=["a", None]), 1, "item_id"),
        (table([[1.0, 2.0]]).drop(["vector"]), None, "vector"),
        (table([[1.0, 2.0]]).drop(["item_id"]), None, "item_id"),
        (pa.table({"item_id": [1], "vector": [[1.0, 2.0]]}), None, "vector"),
        (pa.table({"item_id": [1], "vector": ["text"]}), None, "vector"),
    ],
)
def test_a_broken_file_is_named_with_row_and_field(
    tmp_path: Path, broken: pa.Table, row: int | None, field: str
) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(broken, path)
    with pytest.raises(InputError) as caught:
        read_vectors(path)
    assert (caught.value.file, caught.value.row, caught.value.field) == (str(path), row, field)


def test_the_row_of_a_fault_counts_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    values = [[1.0, 2.0]] * 9
    values[7] = [1.0, float("inf")]
    pq.write_table(table(values), tmp_path / "v.parquet", row_group_size=2)
    with pytest.raises(InputError) as caught:
        list(iterate_vectors(tmp_path / "v.parquet", rows=3))
    assert caught.value.row == 7


def test_a_missing_file_and_one_that_is_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_vectors(tmp_path / "v.parquet")
    (tmp_path / "v.parquet").write_text("no")
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_vectors(tmp_path / "v.parquet")


def test_vectors_of_items_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "vectors.parquet"
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_vectors(file, [(["b", "a"], vectors[:2]), (["retired", "c"], vectors[2:])])
    assert vectors_of(file, ["a", "b", "c"]).tolist() == vectors[[1, 0, 3]].tolist()
    assert vectors_of(file, []).shape == (0, 3)
    with pytest.raises(InputError, match=r"2 items have no vector, among them 'new'") as caught:
        vectors_of(file, ["a", "new", "newer"])
    assert str(file) in str(caught.value)
