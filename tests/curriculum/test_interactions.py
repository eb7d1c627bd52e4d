from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.interactions import Interactions, build_sequences, load_interactions
from item_index.catalogue import Catalogue
from item_index.input_error import InputError


def catalogue_of(item_ids: list[Any]) -> Catalogue:
    count = len(item_ids)
    return Catalogue(
        tuple(item_ids), tuple(f"title {i}" for i in item_ids), ("",) * count, ((),) * count, ("",) * count
    )


def write_interactions(folder: Path, columns: dict[str, Any]) -> Path:
    path = folder / "interactions.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def interactions_of(triples: list[tuple[int, int, int]]) -> Interactions:
    """From (user, item row, time); users are named by their number."""
    users = sorted({user for user, _, _ in triples})
    return Interactions(
        tuple(users),
        np.array([users.index(user) for user, _, _ in triples]),
        np.array([item for _, item, _ in triples]),
        np.array([time for _, _, time in triples]),
    )


def test_rows_of_users_items_and_times(tmp_path: Path) -> None:
    columns = {"user_id": ["v", "u", "v"], "item_id": [30, 10, 10], "timestamp": [5, 6, 7], "rating": [1.0, 2.0, 3.0]}
    interactions = load_interactions(write_interactions(tmp_path, columns), catalogue_of([10, 20, 30]))
    assert interactions.user_ids == ("u", "v")
    assert interactions.users.tolist() == [1, 0, 1]
    assert interactions.items.tolist() == [2, 0, 0]
    assert interactions.timestamps.tolist() == [5, 6, 7]
    assert {interactions.users.dtype, interactions.items.dtype, interactions.timestamps.dtype} == {np.dtype(np.int64)}
    assert len(interactions) == 3


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pa.array([1, 2], pa.int32()), [1, 2]),
        (pa.array([1, 2], pa.timestamp("ms")), [1, 2]),
        (pa.array([datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)] * 2, pa.timestamp("us", "UTC")), [10**6, 10**6]),
        (pa.array([date(1970, 1, 3), date(1969, 12, 31)]), [2, -1]),
        (["1970-01-01T00:00:01", "1970-01-02"], [10**6, 86400 * 10**6]),
        (["1970-01-01T01:00:00+01:00", "1970-01-01 00:00:00.000002Z"], [0, 2]),
    ],
)
def test_kinds_of_time(tmp_path: Path, times: Any, expected: list[int]) -> None:
    path = write_interactions(tmp_path, {"user_id": [1, 1], "item_id": [1, 2], "timestamp": times})
    assert load_interactions(path, catalogue_of([1, 2])).timestamps.tolist() == expected


@pytest.mark.parametrize(
    ("changed", "row", "field", "problem"),
    [
        ({"item_id": [1, 9, 8]}, 1, "item_id", "item 9 is not in the catalogue (and so are 1 more rows)"),
        ({"item_id": ["1", "2", "1"]}, None, "item_id", "strings"),
        ({"item_id": [1, 2, None]}, 2, "item_id", "null"),
        ({"user_id": [None, 2, 3]}, 0, "user_id", "null"),
        ({"user_id": [1.5, 2.5, 3.5]}, None, "user_id", "double"),
        ({"timestamp": [1, None, 3]}, 1, "timestamp", "null"),
        ({"timestamp": [1.0, 2.0, 3.0]}, None, "timestamp", "double"),
        ({"timestamp": ["2020-01-01", "yesterday", "2020"]}, 1, "timestamp", "unparsable time 'yesterday'"),
        ({"timestamp": pa.array([1, 2, 2**63], pa.uint64())}, 2, "timestamp", "too large"),
    ],
)
def test_bad_values_are_named(
    tmp_path: Path, changed: dict[str, Any], row: int | None, field: str, problem: str
) -> None:
    columns = {"user_id": [1, 2, 3], "item_id": [1, 2, 1], "timestamp": [1, 2, 3], **changed}
    path = write_interactions(tmp_path, columns)
    with pytest.raises(InputError) as caught:
        load_interactions(path, catalogue_of([1, 2]))
    assert caught.value.file == str(path)
    assert (caught.value.row, caught.value.field) == (row, field)
    assert problem in caught.value.problem


@pytest.mark.parametrize("missing", ["user_id", "item_id", "timestamp"])
def test_missing_columns_are_named(tmp_path: Path, missing: str) -> None:
    columns = {name: [1] for name in ("user_id", "item_id", "timestamp") if name != missing}
    with pytest.raises(InputError) as caught:
        load_interactions(write_interactions(tmp_path, columns), catalogue_of([1]))
    assert caught.value.field == missing


def test_file_without_rows(tmp_path: Path) -> None:
    empty = pa.array([], pa.int64())
    path = write_interactions(tmp_path, {"user_id": empty, "item_id": empty, "timestamp": empty})
    with pytest.raises(InputError, match="no rows"):
        load_interactions(path, catalogue_of([1]))


def grid(users: int, items: int) -> list[tuple[int, int, int]]:
    """Every user with every item, in an order of time that differs from user to user."""
    return [(user, item, (item * 7 + user * 3) % 11) for user in range(users) for item in range(items)]


def test_sequences_are_in_time_order_and_split_by_place() -> None:
    triples = [(user, item, 100 - item if user == 0 else item) for user in range(3) for item in range(4)]
    _, sequences = build_sequences(interactions_of(triples), catalogue_of(list("abcd")), minimum_interactions=3)
    assert len(sequences) == 3
    assert sequences.sequence(0).tolist() == [3, 2, 1, 0]
    assert sequences.sequence(1).tolist() == [0, 1, 2, 3]
    assert sequences.train(0).tolist() == [3, 2]
    assert sequences.offsets_U1.tolist() == [0, 4, 8, 12]
    assert sequences.timestamps[:4].tolist() == [97, 98, 99, 100]


def test_the_train_part_alone_is_in_the_matrix_and_in_trains_on() -> None:
    _, sequences = build_sequences(interactions_of(grid(5, 4)), catalogue_of([0, 1, 2, 3]), minimum_interactions=3)
    matrix = sequences.train_matrix(6).toarray()
    assert matrix.shape == (5, 6)
    assert matrix.dtype == np.float32
    for place, user_id in enumerate(sequences.user_ids):
        train = set(sequences.train(place).tolist())
        assert len(train) == 2
        assert {item for item in range(6) if matrix[place, item] == 1} == train
        assert {item for item in range(6) if sequences.trains_on(user_id, item)} == train
    assert matrix.sum() == 10
    assert not sequences.trains_on(99, 0)


def test_repeats_keep_the_first_time() -> None:
    triples = [*[(user, item, item) for user in range(3) for item in range(3)], (0, 0, 50), (0, 0, -1)]
    _, sequences = build_sequences(interactions_of(triples), catalogue_of(list("abc")), minimum_interactions=3)
    assert sequences.sequence(0).tolist() == [0, 1, 2]
    assert sequences.timestamps[:3].tolist() == [-1, 1, 2]


def test_filtering_goes_on_to_a_fixed_point() -> None:
    # Item 5 has three users only as long as user 9 is there; user 9 has three items only as long as items 6 and 7 are.
    triples = [*grid(4, 5), (0, 5, 0), (1, 5, 0), (9, 5, 0), (9, 6, 0), (9, 7, 0)]
    catalogue, sequences = build_sequences(
        interactions_of(triples), catalogue_of(list("abcdefgh")), minimum_interactions=3
    )
    assert catalogue.item_ids == tuple("abcde")
    assert sequences.user_ids == (0, 1, 2, 3)


def test_items_are_rows_of_the_filtered_catalogue() -> None:
    triples = [(user, item + 1, item) for user, item, _ in grid(3, 3)]
    catalogue, sequences = build_sequences(
        interactions_of(triples), catalogue_of(list("abcde")), minimum_interactions=3
    )
    assert catalogue.item_ids == tuple("bcd")
    assert [catalogue.item_ids[item] for item in sequences.sequence(0)] == ["b", "c", "d"]


def test_nothing_left_is_refused() -> None:
    with pytest.raises(InputError, match="5-core"):
        build_sequences(interactions_of(grid(4, 4)), catalogue_of(list("abcd")))


def test_too_short_sequences_are_refused() -> None:
    with pytest.raises(InputError, match="minimum_interactions"):
        build_sequences(interactions_of(grid(4, 4)), catalogue_of(list("abcd")), minimum_interactions=2)


def test_ties_follow_the_seed_and_not_the_ids() -> None:
    triples = [(user, item, 0) for user in range(40) for item in range(5)]
    catalogue = catalogue_of(list("abcde"))
    _, sequences = build_sequences(interactions_of(triples), catalogue)
    lasts = [int(sequences.sequence(user)[-1]) for user in range(40)]
    assert len(set(lasts)) == 5
    _, again = build_sequences(interactions_of(triples), catalogue)
    assert again.fingerprint() == sequences.fingerprint()
    _, other = build_sequences(interactions_of(triples), catalogue, seed=1)
    assert other.fingerprint() != sequences.fingerprint()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=80),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_file_does_not_matter(triples: list[tuple[int, int, int]], random: Any) -> None:
    catalogue = catalogue_of([f"i{row}" for row in range(7)])
    shuffled = list(triples)
    random.shuffle(shuffled)
    try:
        kept, sequences = build_sequences(interactions_of(triples), catalogue, minimum_interactions=3)
    except InputError:
        with pytest.raises(InputError):
            build_sequences(interactions_of(shuffled), catalogue, minimum_interactions=3)
        return
    kept_again, again = build_sequences(interactions_of(shuffled), catalogue, minimum_interactions=3)
    assert again.fingerprint() == sequences.fingerprint()
    assert kept_again == kept


def slow_sequences(triples: list[tuple[int, int, int]], minimum: int) -> dict[int, set[tuple[int, int]]]:
    first: dict[tuple[int, int], int] = {}
    for user, item, time in triples:
        first[user, item] = min(time, first.get((user, item), time))
    pairs = set(first)
    while True:
        kept = {
            (user, item)
            for user, item in pairs
            if sum(u == user for u, _ in pairs) >= minimum and sum(i == item for _, i in pairs) >= minimum
        }
        if kept == pairs:
            break
        pairs = kept
    return {user: {(item, first[user, item]) for u, item in pairs if u == user} for user in {u for u, _ in pairs}}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 5)), min_size=20, max_size=90))
def test_agrees_with_the_obvious_way(triples: list[tuple[int, int, int]]) -> None:
    expected = slow_sequences(triples, 3)
    if not expected:
        with pytest.raises(InputError):
            build_sequences(interactions_of(triples), catalogue_of(list(range(7))), minimum_interactions=3)
        return
    catalogue, sequences = build_sequences(
        interactions_of(triples), catalogue_of(list(range(7))), minimum_interactions=3
    )
    assert sequences.user_ids == tuple(sorted(expected))
    for place, user in enumerate(sequences.user_ids):
        times = sequences.timestamps[sequences.offsets_U1[place] : sequences.offsets_U1[place + 1]].tolist()
        items = [catalogue.item_ids[item] for item in sequences.sequence(place)]
        assert set(zip(items, times, strict=True)) == expected[int(user)]
        assert times == sorted(times)


def test_the_order_of_the_catalogue_does_not_change_the_split(tmp_path: Path) -> None:
    columns = {
        "user_id": [user for user in range(6) for _ in range(6)],
        "item_id": [f"i{item}" for _ in range(6) for item in range(6)],
        "timestamp": [0] * 36,
    }
    path = write_interactions(tmp_path, columns)
    orders = []
    for ids in ([f"i{item}" for item in range(6)], [f"i{item}" for item in (3, 1, 5, 0, 2, 4)]):
        catalogue = catalogue_of(ids)
        kept, sequences = build_sequences(load_interactions(path, catalogue), catalogue)
        orders.append([kept.item_ids[item] for item in sequences.items])
    assert orders[0] == orders[1]
