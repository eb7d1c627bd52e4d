"""Every operation of the trie against the obvious reading: a set of tuples."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from item_index.exclusion import ExcludedItems
from item_index.trie import NO_ITEM, NO_NODE, ItemTrie

# Variable depth, one-child chains, one item, items that begin others; codes of one and of two bytes and wider ones, so
# that rows are packed into one sort key with the row number, one without it, and several.
LARGEST_CODES = st.sampled_from([0, 1, 4, 255, 70_000, 2**31 - 2])
RAGGED_CODES = LARGEST_CODES.flatmap(
    lambda largest: st.sets(
        st.lists(
            st.one_of(st.integers(0, min(largest, 3)), st.integers(max(largest - 2, 0), largest)),
            min_size=1,
            max_size=5,
        ).map(tuple),
        min_size=1,
        max_size=40,
    ).map(sorted)
)


def build(rows):
    depth = max(len(row) for row in rows)
    codes = np.array([[*row, *[-1] * (depth - len(row))] for row in rows])
    return ItemTrie.build(codes, np.array([len(row) for row in rows]))


def prefixes_of(rows):
    return sorted({row[:n] for row in rows for n in range(len(row) + 1)})


def node_of(trie, prefix):
    return int(trie.walk(np.array([prefix], dtype=np.int64).reshape(1, len(prefix)))[0])


@given(RAGGED_CODES, st.randoms())
def test_the_trie_holds_exactly_the_prefixes(rows, random):
    random.shuffle(rows)
    trie = build(rows)
    prefixes = prefixes_of(rows)
    nodes = [node_of(trie, prefix) for prefix in prefixes]
    assert sorted(nodes) == list(range(trie.nodes))
    assert trie.depth == max(len(row) for row in rows)
    assert trie.items == len(rows)
    for prefix, node in zip(prefixes, nodes, strict=True):
        at = np.array([node])
        below = [row for row in rows if row[: len(prefix)] == prefix]
        assert trie.items_below[node] == len(below)
        assert trie.level(at)[0] == len(prefix)
        assert trie.prefix(node) == prefix
        assert trie.parent(at)[0] == (node_of(trie, prefix[:-1]) if prefix else NO_NODE)
        assert trie.item(at)[0] == (rows.index(prefix) if prefix in rows else NO_ITEM)
        children, offsets = trie.children(at)
        expected = sorted({row[len(prefix)] for row in below if len(row) > len(prefix)})
        assert trie.code[children].tolist() == expected
        assert offsets.tolist() == [0, len(expected)]
        assert trie.child_count(at)[0] == len(expected)
        tried = sorted({*expected, *(code + 1 for code in expected), *(code - 1 for code in expected), 0})
        steps = trie.step(np.full(len(tried), node), np.array(tried))
        for code, child in zip(tried, steps, strict=True):
            assert child == (node_of(trie, (*prefix, code)) if code in expected else NO_NODE)
    assert trie.largest_fan_out == max(trie.child_count(np.arange(trie.nodes)))


@given(RAGGED_CODES, st.randoms())
def test_a_batch_of_histories_walks_as_each_one_does(rows, random):
    trie = build(rows)
    histories = [*prefixes_of(rows), *((*row, row[0]) for row in rows), *((row[0] + 1, *row[1:]) for row in rows)]
    random.shuffle(histories)
    width = max(len(history) for history in histories)
    codes = np.array([[*history, *[7] * (width - len(history))] for history in histories])
    lengths = np.array([len(history) for history in histories])
    known = {prefix: node_of(trie, prefix) for prefix in prefixes_of(rows)}
    assert trie.walk(codes, lengths).tolist() == [known.get(history, NO_NODE) for history in histories]
    assert trie.contains(codes, lengths).tolist() == [history in rows for history in histories]


@given(RAGGED_CODES, st.randoms())
def test_paths_lead_from_the_first_level_to_the_item(rows, random):
    random.shuffle(rows)
    trie = build(rows)
    paths = trie.paths(np.arange(len(rows)))
    for row, path in zip(rows, paths.tolist(), strict=True):
        expected = [node_of(trie, row[:n]) for n in range(1, len(row) + 1)]
        assert path == expected + [NO_NODE] * (trie.depth - len(row))


@given(RAGGED_CODES, st.data())
def test_excluded_items_are_counted_below_every_node(rows, data):
    trie = build(rows)
    every_row = st.lists(st.integers(0, len(rows) - 1), max_size=len(rows) + 2)
    excluded = data.draw(st.lists(st.none() | every_row, min_size=1, max_size=4))
    table = ExcludedItems.of(trie, excluded)
    for prefix in prefixes_of(rows):
        node = np.full(len(excluded), node_of(trie, prefix))
        below = {row for row, item in enumerate(rows) if item[: len(prefix)] == prefix}
        counts = [len(below & set(items or ())) for items in excluded]
        users = np.arange(len(excluded))
        assert table.below(trie, users, node).tolist() == counts
        assert table.open(trie, users, node).tolist() == [count < len(below) for count in counts]
        if prefix in rows:
            expected = [rows.index(prefix) in (items or ()) for items in excluded]
            assert table.holds_item_at(trie, users, node).tolist() == expected


@given(RAGGED_CODES)
def test_a_saved_trie_is_the_same_trie(tmp_path_factory, rows):
    trie = build(rows)
    file = tmp_path_factory.mktemp("trie") / "trie.safetensors"
    trie.save(file)
    loaded = ItemTrie.load(file)
    for name, array in vars(trie).items():
        if isinstance(array, np.ndarray):
            assert getattr(loaded, name).dtype == array.dtype, name
            np.testing.assert_array_equal(getattr(loaded, name), array, err_msg=name)


def test_a_loaded_trie_is_mapped_not_read(tmp_path):
    rng = np.random.default_rng(0)
    trie = ItemTrie.build(np.unique(rng.integers(0, 256, (400_000, 4)), axis=0))
    trie.save(tmp_path / "trie.safetensors")
    loaded = ItemTrie.load(tmp_path / "trie.safetensors")
    maps = Path("/proc/self/smaps").read_text().split("trie.safetensors")
    assert len(maps) > 1, "the file is not in the process's memory map"
    # Before anything is looked up, next to nothing of it is resident.
    resident = sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in maps[1:])
    assert resident < trie.nbytes / 4
    assert loaded.item(loaded.paths(np.array([17]))[0, 3:]).tolist() == [17]


def test_children_are_consecutive_and_sorted():
    trie = ItemTrie.build(np.array([[1, 0], [0, 2], [0, 1], [1, 3]]))
    assert trie.code.tolist() == [0, 0, 1, 1, 2, 0, 3]
    assert trie.child_start.tolist() == [1, 3, 5, 7, 7, 7, 7, 7]
    assert trie.item_of_rank.tolist() == [2, 1, 0, 3]
    assert trie.code.dtype == np.uint8


def test_full_fan_out():
    codes = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1).reshape(-1, 2)
    trie = ItemTrie.build(codes[::-1])
    assert trie.nodes == 1 + 256 + 65536
    assert trie.item(trie.walk(codes)).tolist() == list(range(65535, -1, -1))


def test_the_bytes_of_a_large_catalogue():
    rng = np.random.default_rng(1)
    codes = np.unique(rng.integers(0, 256, (200_000, 4)), axis=0)
    trie = ItemTrie.build(codes)
    assert trie.nbytes < 40 * len(codes)


@pytest.mark.parametrize("tail", [[], [5, 6]])
def test_items_with_the_same_codes_are_an_error_that_names_both_rows(tail):
    codes = np.array([[1, 2, -1, -1], [1, 2, 3, 4], [1, 2, -1, -1]])
    codes[[0, 2], 2 : 2 + len(tail)] = tail
    lengths = np.array([2 + len(tail), 4, 2 + len(tail)])
    with pytest.raises(ValueError, match=rf"rows 0 and 2 have the same codes \[1, 2{', 5, 6' if tail else ''}\]"):
        ItemTrie.build(codes, lengths)


@pytest.mark.parametrize(
    ("codes", "lengths", "message"),
    [
        (np.zeros((0, 3), int), None, "non-empty"),
        (np.zeros(3, int), None, "non-empty"),
        (np.array([[0, 1], [0, -1]]), None, "row 1 has a negative code"),
        (np.array([[0.5]]), None, "integers"),
        (np.array([[1, 2]]), np.array([3]), "1..2"),
        (np.array([[1, 2]]), np.array([0]), "1..2"),
        (np.array([[1, 2]]), np.array([1, 1]), "1..2"),
    ],
)
def test_malformed_codes_are_errors(codes, lengths, message):
    with pytest.raises(ValueError, match=message):
        ItemTrie.build(codes, lengths)
