"""Growth of an index: nobody's semantic ID changes, nobody's is given out twice, old versions stay readable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from item_index.growth import grow_index, newcomer_rows
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex, assign_semantic_ids

SIZES = (3, 2)


def index_of(ids, codes, spare=8):
    return assign_semantic_ids(ids, np.array(codes).reshape(-1, 2), SIZES, spare_collision_codes=spare)


def semantic_ids(index):
    """{item id: codes}"""
    rows = zip(index.item_ids, index.codes_IL.tolist(), index.lengths_I.tolist(), strict=True)
    return {item_id: tuple(codes[:length]) for item_id, codes, length in rows}


CATALOGUES = st.lists(st.sets(st.integers(0, 25), min_size=1, max_size=14), min_size=2, max_size=6)


@given(CATALOGUES, st.integers(0, 2**32 - 1))
def test_over_any_history_of_catalogues_no_semantic_id_changes_hands(catalogues, seed):
    generator = np.random.default_rng(seed)
    nearest = generator.integers(0, SIZES, (26, 2))  # an item's residual codes, whenever it comes

    def order(ids):
        return generator.permutation(sorted(ids)).tolist()

    first = order(catalogues[0])
    index = index_of(first, nearest[first], spare=1)
    owner = {codes: item_id for item_id, codes in semantic_ids(index).items()}
    of_item = semantic_ids(index)
    seen = set(first)
    for catalogue in catalogues[1:]:
        ids = order(catalogue)
        rows = newcomer_rows(index, ids)
        assert {ids[row] for row in rows} == set(ids) - seen
        tokens_before = {token for level in index.tokens() for token in level}
        active_before = set(index.item_ids)
        growth = grow_index(index, ids, nearest[[ids[row] for row in rows]], spare_collision_codes=1)
        assert growth.added == len(rows)
        assert growth.returned == len((set(ids) & seen) - active_before)
        assert growth.retired == len(active_before - set(ids))
        index = growth.index
        assert list(index.item_ids) == ids
        tokens_now = {token for level in index.tokens() for token in level}
        assert tokens_before <= tokens_now
        assert set(growth.tokens_to_add) == tokens_now - tokens_before
        now = semantic_ids(index)
        for item_id, codes in now.items():
            assert codes[:2] == tuple(nearest[item_id])
            assert of_item.setdefault(item_id, codes) == codes, "an item's semantic ID has changed"
            assert owner.setdefault(codes, item_id) == item_id, "a semantic ID has a second owner"
        seen |= set(ids)
        assert set(index.retired_ids) == seen - set(ids)
        assert index.trie.items == len(ids)


def test_a_newcomer_on_a_bare_semantic_id_continues_it():
    index = index_of(["a", "b"], [[0, 1], [2, 0]])
    growth = grow_index(index, ["a", "b", "c", "d", "e", "f"], np.array([[0, 1], [1, 1], [0, 1], [1, 0]]))
    assert semantic_ids(growth.index) == {
        "a": (0, 1), "b": (2, 0), "c": (0, 1, 0), "d": (1, 1), "e": (0, 1, 1), "f": (1, 0),
    }  # fmt: skip
    assert growth.tokens_to_add == ()
    assert growth.index.version != index.version


def test_newcomers_that_share_new_codes_all_get_a_collision_code():
    growth = grow_index(index_of(["a"], [[0, 0]]), ["b", "a", "c"], np.array([[1, 1], [1, 1]]))
    assert semantic_ids(growth.index) == {"b": (1, 1, 0), "a": (0, 0), "c": (1, 1, 1)}


def test_retired_codes_stay_taken_and_the_item_may_come_back():
    index = index_of(["a", "b", "c"], [[0, 1], [0, 1], [2, 0]])  # a: 0 1 0, b: 0 1 1
    without = grow_index(index, ["a"], np.zeros((0, 2), int))
    assert (without.added, without.retired) == (0, 2)
    growth = grow_index(without.index, ["a", "d", "e"], np.array([[0, 1], [2, 0]]))
    assert semantic_ids(growth.index) == {"a": (0, 1, 0), "d": (0, 1, 2), "e": (2, 0, 0)}
    back = grow_index(growth.index, ["c", "b", "a", "d", "e"], np.zeros((0, 2), int))
    assert (back.added, back.returned, back.retired) == (0, 2, 0)
    assert semantic_ids(back.index)["b"] == (0, 1, 1)
    assert semantic_ids(back.index)["c"] == (2, 0)


def test_when_spare_codes_run_out_the_tokens_to_add_are_named():
    index = index_of(["a", "b"], [[0, 1], [0, 1]], spare=1)
    growth = grow_index(index, ["a", "b", "c"], np.array([[0, 1]]), spare_collision_codes=2)
    assert growth.tokens_to_add == ()
    growth = grow_index(growth.index, ["a", "b", "c", "d"], np.array([[0, 1]]), spare_collision_codes=2)
    assert growth.tokens_to_add == ("<|c_3|>", "<|c_4|>", "<|c_5|>")


def test_ten_percent_in_and_ten_percent_out(tmp_path):
    """Survivors keep their semantic IDs, retired items cannot be reached, and the old version is still readable."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, (16, 16, 8), (1100, 3))
    index = assign_semantic_ids(range(1000), codes[:1000], (16, 16, 8))
    index.save(tmp_path)
    leaving = set(generator.permutation(1000)[:100].tolist())
    ids = [item_id for item_id in range(1100) if item_id not in leaving]
    growth = grow_index(index, ids, codes[1000:])
    growth.index.save(tmp_path)
    loaded = SemanticIdIndex.load(tmp_path)
    assert loaded.version == growth.index.version != index.version
    assert set(loaded.retired_ids) == leaving
    before, after = semantic_ids(index), semantic_ids(loaded)
    assert all(after[item_id] == before[item_id] for item_id in before if item_id not in leaving)
    gone = [index.item_ids.index(item_id) for item_id in sorted(leaving)]
    assert not loaded.trie.contains(index.codes_IL[gone], index.lengths_I[gone]).any()
    old = SemanticIdIndex.load(tmp_path, version=index.version)
    assert semantic_ids(old) == before
    assert old.trie.contains(index.codes_IL[gone], index.lengths_I[gone]).all()
    with pytest.raises(InputError, match=r"no index version 0123 here, only \w{16}, \w{16}\."):
        SemanticIdIndex.load(tmp_path, version="0123")


def test_input_that_does_not_fit_is_refused():
    index = index_of(["a"], [[0, 0]])
    with pytest.raises(ValueError, match="distinct"):
        grow_index(index, ["a", "a"], np.zeros((0, 2), int))
    with pytest.raises(ValueError, match="2 newcomers"):
        grow_index(index, ["b", "c"], np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="level sizes"):
        grow_index(index, ["b"], np.array([[0, 2]]))
