"""The collaborative block: what lies close together, what stays zero, and that nothing of the targets gets in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from curriculum.interactions import UserSequences
from item_index.collaborative import collaborative_vectors, fuse

ITEMS = 12


def two_tastes(users: int = 40, seed: int = 0) -> UserSequences:
    """Users of even number have items 0..4, the others items 5..9; items 10 and 11 are targets alone."""
    generator = np.random.default_rng(seed)
    rows = [[*(generator.permutation(5) + 5 * (user % 2)), 10, 11] for user in range(users)]
    return UserSequences(
        tuple(range(users)), np.arange(users + 1) * 7, np.array(rows).ravel(), np.zeros(7 * users, dtype=np.int64)
    )


def test_items_of_the_same_users_lie_close_together() -> None:
    vectors = collaborative_vectors(two_tastes().train_matrix(ITEMS), dimensions=1, seed=0)
    assert vectors.shape == (ITEMS, 1)
    assert vectors.dtype == np.float32
    cosines = vectors[:10] @ vectors[:10].T
    expected = np.where((np.arange(10)[:, None] < 5) == (np.arange(10) < 5), 1.0, -1.0)
    np.testing.assert_allclose(cosines, expected, atol=1e-5)


def test_rows_are_of_unit_length_and_zero_without_train_interactions() -> None:
    generator = np.random.default_rng(1)
    train = sparse.csr_array((generator.random((30, 20)) < 0.3).astype(np.float32) * (np.arange(20) != 7))
    norms = np.linalg.norm(collaborative_vectors(train, dimensions=6, seed=0), axis=1)
    np.testing.assert_allclose(norms[np.arange(20) != 7], 1.0, atol=1e-5)
    assert norms[7] == 0.0


def test_with_all_dimensions_inner_products_are_the_normalised_co_occurrences() -> None:
    train = sparse.csr_array((np.random.default_rng(2).random((15, 9)) < 0.5).astype(np.float32))
    dense = train.toarray()
    normalised = dense / np.sqrt(dense.sum(axis=1, keepdims=True)) / np.sqrt(dense.sum(axis=0))
    popularity = np.sqrt(dense.sum(axis=0) / dense.sum())
    expected = normalised.T @ normalised - np.outer(popularity, popularity)
    lengths = np.sqrt(np.diag(expected))
    vectors = collaborative_vectors(train, dimensions=8, seed=0)
    np.testing.assert_allclose(vectors @ vectors.T, expected / np.outer(lengths, lengths), atol=1e-4)


def test_validation_and_test_interactions_change_nothing() -> None:
    generator = np.random.default_rng(3)
    rows = [generator.permutation(ITEMS)[:6] for _ in range(25)]
    sequences = UserSequences(tuple(range(25)), np.arange(26) * 6, np.concatenate(rows), np.zeros(150, dtype=np.int64))
    others = sequences.items.copy().reshape(25, 6)
    others[:, 4:] = generator.integers(0, ITEMS, (25, 2))
    changed = replace(sequences, items=others.ravel())
    assert (changed.items != sequences.items).any()
    made = [collaborative_vectors(each.train_matrix(ITEMS), dimensions=4, seed=0) for each in (sequences, changed)]
    np.testing.assert_array_equal(made[0], made[1])
    # A train interaction does matter, so the comparison above can fail.
    others[0, 0] = next(item for item in range(ITEMS) if item not in others[0])
    train = replace(sequences, items=others.ravel()).train_matrix(ITEMS)
    assert not np.array_equal(collaborative_vectors(train, dimensions=4, seed=0), made[0])


def test_a_seed_fixes_the_vectors() -> None:
    train = sparse.csr_array((np.random.default_rng(4).random((60, 40)) < 0.2).astype(np.float32))
    first, again = (collaborative_vectors(train, dimensions=5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 2)])
def test_tiny_tables_get_fewer_dimensions(shape: tuple[int, int]) -> None:
    vectors = collaborative_vectors(sparse.csr_array(np.ones(shape, dtype=np.float32)), dimensions=4, seed=0)
    assert vectors.shape == (shape[1], 1)
    assert np.isfinite(vectors).all()


def test_fused_blocks_have_the_wanted_ratio_of_mean_norms() -> None:
    generator = np.random.default_rng(5)
    text = generator.normal(size=(20, 6)).astype(np.float32)
    collaborative = generator.normal(size=(20, 3)).astype(np.float32)
    collaborative[4] = 0.0
    for weight in (0.0, 0.5, 2.0):
        fused = fuse(text, collaborative, weight=weight)
        assert fused.shape == (20, 9)
        assert fused.dtype == np.float32
        np.testing.assert_array_equal(fused[:, :6], text)
        np.testing.assert_array_equal(fused[4, 6:], 0.0)
        present = np.delete(np.linalg.norm(fused[:, 6:], axis=1), 4)
        assert present.mean() == pytest.approx(weight * np.linalg.norm(text, axis=1).mean(), rel=1e-5)


def test_newcomers_are_their_text_and_zeros() -> None:
    text = np.ones((2, 3), dtype=np.float32)
    np.testing.assert_array_equal(fuse(text, np.zeros((2, 2)), weight=1.0), [[1, 1, 1, 0, 0]] * 2)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="2 text vectors and 3"):
        fuse(np.ones((2, 1)), np.ones((3, 1)), weight=1.0)
    with pytest.raises(ValueError, match="negative"):
        fuse(np.ones((2, 1)), np.ones((2, 1)), weight=-1.0)
    with pytest.raises(ValueError, match="dimensions"):
        collaborative_vectors(sparse.csr_array(np.ones((3, 3))), dimensions=0, seed=0)
