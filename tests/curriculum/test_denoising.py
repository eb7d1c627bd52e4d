"""The denoiser against a slow dense reference that recounts everything for each history."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from curriculum import denoising
from curriculum.denoising import Denoiser
from item_index.ragged import RaggedArray


def mean_rank(values, number):
    """Rank of one value among all, equal ones sharing the mean."""
    less, equal = sum(v < values[number] for v in values), sum(v == values[number] for v in values)
    return less + (equal - 1) / 2


def kept_by_the_rule(vectors, train, history, target, user, removed_share, maximum_items):
    """The documented criterion, word for word: the user's row is taken out and all counts are made anew."""
    others = np.delete(train, user, axis=0)
    similarity, co_interaction = [], []
    for item in history:
        norms = np.linalg.norm(vectors[item].astype(float)) * np.linalg.norm(vectors[target].astype(float))
        cosine = float(vectors[item].astype(float) @ vectors[target]) / norms if norms > 0 else 0.0
        similarity.append(round(cosine, 6))
        both = int((others[:, item] * others[:, target]).sum())
        users = int(others[:, item].sum()) * int(others[:, target].sum())
        # Rounded, because here and there equal cosines are computed in different ways.
        co_interaction.append(round(both / users**0.5, 9) if both else 0.0)
    places = range(len(history))
    evidence = [(mean_rank(similarity, p) + mean_rank(co_interaction, p)) / 2 for p in places]
    stays = max(1, len(history) - int(removed_share * len(history) + 0.5))
    stays = min(stays, maximum_items or stays)
    best = sorted(places, key=lambda p: (evidence[p], p))[-stays:]
    return tuple(history[p] for p in sorted(best))


@st.composite
def worlds(draw):
    users, items = draw(st.integers(1, 7)), draw(st.integers(2, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    train = (generator.random((users, items)) < draw(st.sampled_from([0.2, 0.5, 0.9]))).astype(np.float32)
    # Few values, so that there are ties, multiples of one another, and vectors of zeros.
    vectors = generator.integers(-1, 2, (items, draw(st.integers(1, 3)))).astype(np.float32)
    examples = draw(st.integers(0, 8))
    histories = [generator.permutation(items)[: generator.integers(1, items + 1)].tolist() for _ in range(examples)]
    return vectors, train, histories, generator.integers(0, items, examples), generator.integers(0, users, examples)


@given(worlds(), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 0.99]), st.sampled_from([None, 1, 2, 3, 50]))
def test_it_keeps_what_the_dense_reference_keeps(world, removed_share, maximum_items):
    vectors, train, histories, targets, users = world
    denoiser = Denoiser(
        vectors, sparse.csr_array(train), removed_share=removed_share, maximum_items=maximum_items
    )  # fmt: skip
    kept = denoiser.keep_many(RaggedArray.of(histories, np.int64), targets, users)
    assert len(kept) == len(histories)
    for items, history, target, user in zip(kept, histories, targets, users, strict=True):
        expected = kept_by_the_rule(vectors, train, history, target, user, removed_share, maximum_items)
        assert tuple(items.tolist()) == expected
        assert denoiser.keep(history, int(target), user=int(user)) == expected
        remaining = iter(history)
        assert all(item in remaining for item in expected)  # a subsequence: nothing invented, repeated or moved


def test_blocks_make_no_difference(monkeypatch):
    generator = np.random.default_rng(3)
    train = sparse.csr_array((generator.random((60, 40)) < 0.3).astype(np.float32))
    histories = RaggedArray.of([generator.permutation(40)[: generator.integers(1, 20)] for _ in range(90)], np.int64)
    targets, users = generator.integers(0, 40, 90), generator.integers(0, 60, 90)
    denoiser = Denoiser(generator.normal(size=(40, 8)).astype(np.float32), train, removed_share=0.4)
    whole = denoiser.keep_many(histories, targets, users)
    monkeypatch.setattr(denoising, "BLOCK_PAIRS", 7)
    monkeypatch.setattr(denoising, "BLOCK_TARGETS", 3)
    parts = denoiser.keep_many(histories, targets, users)
    assert parts.values.tolist() == whole.values.tolist()
    assert parts.offsets.tolist() == whole.offsets.tolist()


def test_by_hand_and_the_own_user_does_not_vote():
    # Items 0, 1, 2 and the target 3. All vectors are alike, so co-interaction and recency decide.
    train = np.array([
        [1, 1, 1, 1],  # user 0, whose history it is
        [1, 0, 0, 1],
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 0, 1],
    ])  # fmt: skip
    denoiser = Denoiser(np.ones((4, 2), np.float32), sparse.csr_array(train), removed_share=0.3)
    # Without user 0: item 0 has 1 user, who has the target; item 1 has 3, one of whom does; item 2 nobody.
    assert denoiser.keep([0, 1, 2], 3, user=0) == (0, 1)
    # Without user 2: 2 of item 0's 2 users have the target, 2 of item 1's 3, 1 of item 2's 1: up to the same factor
    # the cosines are 2 / sqrt(2), 2 / sqrt(3) and 1 / sqrt(1). A share (1, 2/3, 1) would order them otherwise.
    assert denoiser.keep([0, 1, 2], 3, user=2) == (0, 1)
    assert denoiser.keep([2, 1, 0], 3, user=2) == (1, 0)


def test_a_pair_that_only_the_user_has_is_no_evidence():
    """Were the user counted, the pair of the user's own history and target would be the strongest there is."""
    train = np.zeros((6, 3))
    train[0] = 1  # item 0 and the target 2 meet in user 0 alone
    train[1, [1, 2]] = 1
    train[2:, 1] = 1  # and item 1 has users who did not take the target
    vectors = np.ones((3, 1), np.float32)
    one_of_two = Denoiser(vectors, sparse.csr_array(train), removed_share=0.5)
    assert one_of_two.keep([0, 1], 2, user=0) == (1,)
    assert one_of_two.keep([1, 0], 2, user=0) == (1,)
    # For anybody else the one meeting counts: 1 / sqrt(1) against 2 / sqrt(5).
    assert one_of_two.keep([1, 0], 2, user=5) == (0,)


def test_vectors_decide_where_nobody_has_the_items():
    vectors = np.array([[1, 0], [3, 4], [0, 2], [5, 0]], np.float32)
    denoiser = Denoiser(vectors, sparse.csr_array((2, 4), dtype=np.float32), removed_share=0.3, maximum_items=1)
    assert denoiser.keep([0, 1, 2], 3, user=0) == (0,)
    assert denoiser.keep([2, 1], 3, user=0) == (1,)
    assert denoiser.keep([2, 2], 0, user=1) == (2,)


def test_the_later_item_stays_where_evidence_ties():
    denoiser = Denoiser(np.ones((5, 2), np.float32), sparse.csr_array((1, 5), dtype=np.float32), removed_share=0.5)
    assert denoiser.keep([3, 0, 1, 2], 4, user=0) == (1, 2)


@pytest.mark.parametrize(
    ("removed_share", "maximum_items", "lengths", "by_share", "by_bound"),
    [
        (0.3, None, [1, 2, 4, 5, 10, 20], [0, 1, 1, 2, 3, 6], [0] * 6),
        (0.99, None, [1, 2, 3, 20], [0, 1, 2, 19], [0] * 4),
        (0.0, None, [1, 7], [0, 0], [0, 0]),
        (0.3, 6, [5, 8, 9, 20], [2, 2, 3, 6], [0, 0, 0, 8]),
        (0.0, 1, [1, 3], [0, 0], [0, 2]),
    ],
)
def test_how_many_are_removed(removed_share, maximum_items, lengths, by_share, by_bound):
    denoiser = Denoiser(
        np.ones((30, 1), np.float32),
        sparse.csr_array((1, 30)),
        removed_share=removed_share,
        maximum_items=maximum_items,
    )
    assert [counts.tolist() for counts in denoiser.removals(np.array(lengths))] == [by_share, by_bound]
    kept = denoiser.keep_many(
        RaggedArray.of([range(length) for length in lengths], np.int64), np.zeros(len(lengths), int),
        np.zeros(len(lengths), int),
    )  # fmt: skip
    assert kept.lengths.tolist() == [n - a - b for n, a, b in zip(lengths, by_share, by_bound, strict=True)]


def test_bad_input_is_refused():
    vectors, train = np.ones((4, 2), np.float32), sparse.csr_array((3, 4))
    with pytest.raises(ValueError, match="vectors of shape"):
        Denoiser(vectors[:3], train, removed_share=0.3)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="removed_share"):
            Denoiser(vectors, train, removed_share=share)
    with pytest.raises(ValueError, match="maximum_items"):
        Denoiser(vectors, train, removed_share=0.3, maximum_items=0)
    denoiser = Denoiser(vectors, train, removed_share=0.3)
    with pytest.raises(ValueError, match="history 0 is empty"):
        denoiser.keep([], 0, user=0)
    for history, target, user in (([4], 0, 0), ([-1], 0, 0), ([0], 4, 0), ([0], 0, 3), ([0], 0, -1)):
        with pytest.raises(ValueError, match="s are rows"):
            denoiser.keep(history, target, user=user)
    with pytest.raises(ValueError, match="1 histories, 2 targets"):
        denoiser.keep_many(RaggedArray.of([[0]], np.int64), np.array([0, 1]), np.array([0]))
