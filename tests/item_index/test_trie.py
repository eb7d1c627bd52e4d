import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from item_index.trie import NO_ITEM, NO_NODE, ROOT, ItemTrie

RAGGED_CODES = st.sets(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=40).map(
    sorted
)


def build(rows):
    depth = max(len(row) for row in rows)
    codes = np.array([[*row, *[-1] * (depth - len(row))] for row in rows])
    return ItemTrie.build(codes, np.array([len(row) for row in rows]))


@given(RAGGED_CODES, st.randoms())
def test_the_trie_holds_exactly_the_prefixes(rows, random):
    random.shuffle(rows)
    trie = build(rows)
    prefixes = {row[:n] for row in rows for n in range(1, len(row) + 1)}
    assert trie.nodes == len(prefixes) + 1
    for prefix in prefixes:
        node = ROOT
        for code in prefix:
            node = int(trie.step(np.array([node]), np.array([code]))[0])
            assert node != NO_NODE
        below = [row for row, item in enumerate(rows) if item[: len(prefix)] == prefix]
        assert trie.items_below[node] == len(below)
        assert trie.item[node] == (rows.index(prefix) if prefix in rows else NO_ITEM)
        children, offsets = trie.children(np.array([node]))
        expected = sorted({row[len(prefix)] for row in rows if row[: len(prefix)] == prefix and len(row) > len(prefix)})
        assert trie.code[children].tolist() == expected
        assert offsets.tolist() == [0, len(expected)]
        missing = set(range(6)) - set(expected)
        for code in missing:
            assert trie.step(np.array([node]), np.array([code]))[0] == NO_NODE


@given(RAGGED_CODES, st.data())
def test_excluded_items_are_counted_at_every_ancestor(rows, data):
    trie = build(rows)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
    counts = trie.excluded_below(np.array(chosen, dtype=np.int64))
    expected = np.zeros(trie.nodes, dtype=int)
    for item in chosen:
        node = int(trie.leaf[item])
        while node >= 0:
            expected[node] += 1
            node = int(trie.parent[node])
    assert counts.tolist() == expected.tolist()


def test_children_are_consecutive_and_sorted():
    trie = ItemTrie.build(np.array([[1, 0], [0, 2], [0, 1], [1, 3]]))
    assert trie.code.tolist() == [-1, 0, 1, 1, 2, 0, 3]
    assert trie.child_start.tolist() == [1, 3, 5, 7, 7, 7, 7, 7]
    assert trie.item.tolist() == [-1, -1, -1, 2, 1, 0, 3]


def test_items_with_the_same_codes_are_an_error_that_names_both_rows():
    with pytest.raises(ValueError, match="rows 0 and 2 have the same codes"):
        ItemTrie.build(np.array([[1, 2], [1, 3], [1, 2]]))


@pytest.mark.parametrize("codes", [np.zeros((0, 3), int), np.zeros(3, int), np.array([[0, -1]]), np.array([[0.5]])])
def test_malformed_codes_are_errors(codes):
    with pytest.raises(ValueError):  # noqa: PT011
        ItemTrie.build(codes)
