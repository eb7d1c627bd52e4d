"""Supervised rows, read back token by token: what is learnt, how often, and what never appears."""

import numpy as np
import pytest

from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.rows import (
    ReasoningExample,
    direct_row,
    direct_windows,
    held_out_targets,
    places_in_sequence,
    reasoning_row,
    train_positions,
)

HISTORY = 5


@pytest.fixture(scope="module")
def builder(tiny):
    return PromptBuilder(tiny.tokenizer, tiny.index, tiny.constraint.tokens, history_items=HISTORY)


@pytest.fixture(scope="module")
def sequences():
    """Users of every length from 3 on; no user has an item twice."""
    generator = np.random.default_rng(0)
    lengths = [3, 4, 5, 6, 7, 8, 9, 12, 13, 20, 29, 32]
    return UserSequences(
        user_ids=tuple(range(len(lengths))),
        offsets_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate([generator.permutation(32)[:length] for length in lengths]).astype(np.int64),
        timestamps=np.arange(sum(lengths), dtype=np.int64),
    )


def items_in(row, tiny):
    """(item, learnt) of every semantic ID of a row in order; a semantic ID is learnt as a whole or not at all."""
    tokens, learnt = row
    assert tokens.shape == learnt.shape
    assert learnt.dtype == bool
    item_of_codes = {tuple(spelled): item for item, spelled in enumerate(tiny.builder.item_tokens)}
    levels = tiny.constraint.tokens.level_of_token[tokens]
    found, place = [], 0
    while place < len(tokens):
        if levels[place] < 0:
            place += 1
            continue
        assert levels[place] == 0
        end = place + 1
        while end < len(tokens) and levels[end] > 0:
            end += 1
        assert len(set(learnt[place:end].tolist())) == 1
        found.append((item_of_codes[tuple(tokens[place:end].tolist())], bool(learnt[place])))
        place = end
    return found


def windows_of(sequences, user, held_out, builder, seed):
    """Direct windows of one user, behind another one whose only train item gives no window."""
    start, end = sequences.offsets_U1[user], sequences.offsets_U1[user + 1]
    items = np.concatenate([[0, 1, 2], sequences.sequence(user)])
    two = UserSequences((0, 1), np.array([0, 3, len(items)]), items, np.arange(len(items)))
    marks = np.concatenate([[True] * 3, held_out[start:end]])
    return list(direct_windows(two, marks, builder, generator=np.random.default_rng(seed)))


@pytest.mark.parametrize("seed", range(6))
def test_every_train_item_is_learnt_once_but_the_first_of_a_window_and_held_out_ones(tiny, builder, sequences, seed):
    held_out = held_out_targets(sequences, share=0.3, minimum_history=2, seed=seed)
    for user in range(len(sequences)):
        start = int(sequences.offsets_U1[user])
        train = sequences.train(user).tolist()
        windows = [items_in(row, tiny) for row in windows_of(sequences, user, held_out, builder, seed)]
        for window in windows:
            items = [item for item, _ in window]
            begin = train.index(items[0])
            assert items == train[begin : begin + len(items)], "a window is a run of the train part"
            assert 2 <= len(items) <= HISTORY + 1
            skipped = held_out[start + begin : start + begin + len(items)]
            assert [learnt for _, learnt in window] == [n > 0 and not skipped[n] for n in range(len(items))]
        shown = [item for window in windows for item, _ in window]
        assert len(set(shown)) == len(shown), "windows do not overlap"
        assert all(len(window) == HISTORY + 1 for window in windows[1:-1])
        # Only a first or last window of a single item has nothing to learn and is left out.
        assert set(train) - set(shown) <= {train[0], train[-1]} if train else not windows


def test_validation_and_test_items_never_appear_and_held_out_targets_are_never_learnt(tiny, builder, sequences):
    held_out = held_out_targets(sequences, share=0.5, minimum_history=2, seed=0)
    for user in range(len(sequences)):
        start, end = int(sequences.offsets_U1[user]), int(sequences.offsets_U1[user + 1])
        rows = windows_of(sequences, user, held_out, builder, seed=0)
        shown = [pair for row in rows for pair in items_in(row, tiny)]
        assert not {item for item, _ in shown} & set(sequences.sequence(user)[-2:].tolist())
        kept_out = set(sequences.items[start:end][held_out[start:end]].tolist())
        assert not {item for item, learnt in shown if learnt} & kept_out


def test_the_first_cut_is_random_so_every_item_is_learnt_in_some_pass(tiny, builder, sequences):
    nothing = np.zeros(len(sequences.items), dtype=bool)
    generator = np.random.default_rng(0)
    passes = [list(direct_windows(sequences, nothing, builder, generator=generator)) for _ in range(12)]
    assert len({tuple(len(row[0]) for row in rows) for rows in passes}) > 1
    again = list(direct_windows(sequences, nothing, builder, generator=np.random.default_rng(0)))
    assert all(a[0].tolist() == b[0].tolist() for a, b in zip(again, passes[0], strict=True))
    user = len(sequences) - 1
    learnt = {
        item
        for seed in range(12)
        for row in windows_of(sequences, user, nothing, builder, seed)
        for item, is_learnt in items_in(row, tiny)
        if is_learnt
    }
    assert learnt == set(sequences.train(user)[1:].tolist())


def test_a_direct_row_is_prompt_and_response_and_teaches_the_end_after_a_learnt_target(builder):
    items = np.array([3, 5, 30, 9])
    tokens, learnt = direct_row(items, np.array([False, False, True, False]), builder)
    prompt, response = builder.prompt(items[:-1], "direct"), builder.direct_response(9)
    assert tokens.tolist() == [*prompt, *response]
    assert tokens.dtype == np.int32
    assert learnt[len(prompt) :].all()
    start = builder.history_start("direct")
    spelled = [len(builder.item_tokens[item]) for item in (3, 5, 30)]
    expected = np.zeros(len(prompt), dtype=bool)
    expected[start + spelled[0] : start + spelled[0] + spelled[1]] = True
    assert learnt[: len(prompt)].tolist() == expected.tolist()
    held_out_target = direct_row(items, np.array([False, False, True, True]), builder)[1]
    assert not held_out_target[len(prompt) :].any()


def test_a_reasoning_row_learns_its_response_and_the_history_that_is_not_held_out(tiny, builder):
    example = ReasoningExample(
        position=8, history=(1, 2, 30, 4), target=6, think="Evidence: some.", rewriting="Rewritten history:"
    )
    held_out = np.zeros(12, dtype=bool)
    held_out[[2, 6, 8]] = True  # position 6 is the history's item 30; 8 would be the target itself
    tokens, learnt = reasoning_row(example, held_out, builder, dense=True)
    prompt = builder.prompt(example.history, "reasoning")
    response = builder.reasoning_response(example.think, example.rewriting, 6)
    assert tokens.tolist() == [*prompt, *response]
    assert learnt[len(prompt) :].all()
    assert items_in((tokens, learnt), tiny) == [(1, False), (2, True), (30, False), (4, True), (6, True)]
    same_tokens, response_alone = reasoning_row(example, held_out, builder, dense=False)
    assert same_tokens.tolist() == tokens.tolist()
    assert np.flatnonzero(response_alone).tolist() == list(range(len(prompt), len(tokens)))


def test_held_out_targets_are_a_share_of_train_targets_with_enough_history(sequences):
    eligible = train_positions(sequences) & (places_in_sequence(sequences) >= 4)
    for share in (0.0, 0.25, 0.6):
        held_out = held_out_targets(sequences, share=share, minimum_history=4, seed=1)
        assert held_out.sum() == round(share * eligible.sum())
        assert not (held_out & ~eligible).any()
    first, second, other = (held_out_targets(sequences, share=0.4, minimum_history=4, seed=s) for s in (1, 1, 2))
    assert (first == second).all()
    assert (first != other).any()


def test_train_positions_and_places_follow_the_users(sequences):
    train, places = train_positions(sequences), places_in_sequence(sequences)
    for user in range(len(sequences)):
        start, end = sequences.offsets_U1[user], sequences.offsets_U1[user + 1]
        assert places[start:end].tolist() == list(range(end - start))
        assert train[start:end].tolist() == [True] * (end - start - 2) + [False] * 2
