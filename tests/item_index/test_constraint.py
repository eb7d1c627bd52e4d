"""The automaton against a slow reading of its rules, written with plain lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from item_index.constraint import AnswerConstraint, ConstraintViolation, Phase
from item_index.ragged import RaggedArray
from item_index.tokens import SemanticIdTokens
from item_index.trie import ItemTrie

# Items: two plain ones, one that is the beginning of another, and one apart. Level tokens: a 10.., b 20.., c 30..
ITEMS = [(0, 0), (0, 1), (1, 0), (1, 0, 0), (1, 0, 1), (2, 1)]
EOS, PAD, THINK, END_THINK, ANSWER, END_ANSWER, WORDS = 0, 1, 2, 3, 4, 5, (6, 7, 8)
VOCABULARY, TOKENIZER = 40, 36


def constraint(*, constrained: bool = True) -> AnswerConstraint:
    codes = np.array([[*item, *[-1] * (3 - len(item))] for item in ITEMS])
    tokens = SemanticIdTokens(
        think_open=THINK, think_close=END_THINK, answer_open=ANSWER, answer_close=END_ANSWER, end_of_sequence=EOS,
        stop_tokens=(PAD,), code_tokens=(np.arange(10, 14), np.arange(20, 22), np.arange(30, 32)),
        tokenizer_size=TOKENIZER, vocabulary_size=VOCABULARY,
    )  # fmt: skip
    return AnswerConstraint(ItemTrie.build(codes, np.array([len(item) for item in ITEMS])), tokens, constrained)


CONSTRAINT = constraint()


def item_tokens(item):
    return [(10, 20, 30)[level] + code for level, code in enumerate(item)]


SPELLED = [item_tokens(item) for item in ITEMS]
CLOSING = 2 * 3 + 3


def slow_allowed(response, mode, budget, excluded=()):
    """Set of allowed next tokens, or None when the response is over; read from the rules token by token."""
    answerable = [SPELLED[item] for item in range(len(ITEMS)) if item not in excluded]
    phase, open_id = ("THINK" if mode == "reasoning" else "ANSWER"), []

    def free(phase):
        allowed = {*range(TOKENIZER)} - {EOS, PAD, THINK, END_ANSWER, 13, *range(20, 22), *range(30, 32)}
        return allowed - ({ANSWER} if phase == "THINK" else {END_THINK})

    def options(used):
        if phase == "DONE":
            return {EOS}
        if phase == "CLOSED":
            return {EOS}
        n = len(open_id)
        if phase == "ANSWER":
            allowed = {spelled[n] for spelled in answerable if spelled[:n] == open_id and len(spelled) > n}
            if open_id in answerable:
                allowed.add(END_ANSWER if mode == "reasoning" else EOS)
            return allowed
        forced = budget - used <= CLOSING
        boundary = not open_id or open_id in SPELLED
        onward = {s[n] for s in SPELLED if s[:n] == open_id and len(s) > n} if open_id else set()
        if forced and boundary:
            return {END_THINK if phase == "THINK" else ANSWER}
        return onward | (free(phase) if boundary else set())

    for used, token in enumerate(response):
        allowed = options(used)
        assert token in allowed, (response, used, token)
        if phase in ("THINK", "REWRITE"):
            n = len(open_id)
            continues = open_id and any(s[: n + 1] == [*open_id, token] for s in SPELLED)
            if token == END_THINK:
                phase, open_id = "REWRITE", []
            elif token == ANSWER:
                phase, open_id = "ANSWER", []
            elif continues:
                open_id = [*open_id, token]
            else:
                open_id = [token] if 10 <= token < 14 else []
        elif phase == "ANSWER":
            if token == EOS:
                phase = "DONE"
            elif token == END_ANSWER:
                phase, open_id = "CLOSED", []
            else:
                open_id = [*open_id, token]
        else:
            phase = "DONE"
    return options(len(response)), phase == "DONE"


def as_set(allowed, row=0):
    tokens = set(allowed.listed[row].tolist())
    assert len(tokens) == len(allowed.listed[row])
    if allowed.free_text[row] >= 0:
        tokens |= set(np.nonzero(CONSTRAINT.free_text_masks[allowed.free_text[row]])[0].tolist())
    return tokens


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["direct", "reasoning"]),
    st.integers(CLOSING, 30),
    st.sets(st.integers(0, len(ITEMS) - 1), max_size=len(ITEMS) - 1),
    st.randoms(use_true_random=False),
)
def test_allowed_sets_equal_the_slow_reading_along_random_responses(mode, budget, excluded, random):
    states = CONSTRAINT.start([mode], [budget], [sorted(excluded)])
    response = []
    while True:
        expected, over = slow_allowed(response, mode, budget, excluded)
        assert as_set(CONSTRAINT.allowed(states)) == expected
        if over:
            break
        # Structure and semantic-ID tokens more often than chance, so that every phase is reached.
        special = sorted(expected - set(WORDS))
        token = random.choice(special if special and random.random() < 0.7 else sorted(expected))
        CONSTRAINT.advance(states, np.array([token]))
        response.append(token)
    assert len(response) <= budget
    answer = response[response.index(ANSWER) + 1 : response.index(END_ANSWER)] if mode == "reasoning" else response[:-1]
    assert answer in SPELLED
    assert SPELLED.index(answer) not in excluded
    assert states.phase[0] == Phase.DONE
    rescanned = CONSTRAINT.start([mode], [budget], [sorted(excluded)])
    scanned = CONSTRAINT.scan(RaggedArray.of([response], np.int32), rescanned)
    for position in range(len(response)):
        assert as_set(scanned, position) == slow_allowed(response[:position], mode, budget, excluded)[0]


def test_scan_of_a_batch_equals_the_scans_one_by_one():
    responses = [
        [6, 10, 20, 3, 4, *SPELLED[3], 5, 0],
        [*SPELLED[0], 0],
        [7, 3, *SPELLED[2], *SPELLED[5], 8, 4, *SPELLED[1], 5, 0],
    ]
    modes, budgets = ["reasoning", "direct", "reasoning"], [40, 4, 40]
    batch = CONSTRAINT.scan(RaggedArray.of(responses, np.int32), CONSTRAINT.start(modes, budgets, [None, [2], [0]]))
    at = 0
    for response, mode, budget, excluded in zip(responses, modes, budgets, [None, [2], [0]], strict=True):
        alone = CONSTRAINT.scan(RaggedArray.of([response], np.int32), CONSTRAINT.start([mode], [budget], [excluded]))
        for position in range(len(response)):
            assert as_set(batch, at) == as_set(alone, position)
            at += 1


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_without_the_constraint_every_token_may_come_until_the_response_ends(mode):
    free = constraint(constrained=False)
    everything = {*range(TOKENIZER)}
    response = [20, THINK, 13, ANSWER, *SPELLED[0], 8, *([6] * CLOSING), EOS]
    states = free.start([mode], [len(response)], [[0]])
    allowed = free.scan(RaggedArray.of([response], np.int32), states)
    assert allowed.listed.values.tolist() == []
    for kind in allowed.free_text:
        assert set(np.nonzero(free.free_text_masks[kind])[0].tolist()) == everything
    assert (states.phase[0], bool(states.forced[0])) == (Phase.DONE, False)
    assert free.allowed(states).listed[0].tolist() == [EOS]
    for wrong in ([TOKENIZER], [6, EOS, 6]):
        with pytest.raises(ConstraintViolation):
            free.scan(RaggedArray.of([wrong], np.int32), free.start([mode], [20]))


def test_a_closing_that_the_budget_forces_is_recorded():
    def forced(response, budget):
        states = CONSTRAINT.start(["reasoning"], [budget])
        CONSTRAINT.scan(RaggedArray.of([response], np.int32), states)
        return bool(states.forced[0])

    response = [6, 6, 3, 7, 4, *SPELLED[0], 5, 0]
    assert not forced(response, CLOSING + 5)
    assert forced([6, 6, 3, 4, *SPELLED[0], 5, 0], CLOSING + 2)
    # Just enough left at every free-text position: `<answer>` comes with CLOSING + 1 tokens left.
    assert not forced(response, CLOSING + len([6, 6, 3, 7, 4]))
    assert forced([6, 3, 4, *SPELLED[0], 5, 0], CLOSING + 1)


def test_an_item_that_begins_another_allows_its_children_and_the_terminator():
    states = CONSTRAINT.start(["direct"], [10])
    CONSTRAINT.scan(RaggedArray.of([SPELLED[2]], np.int32), states)
    assert as_set(CONSTRAINT.allowed(states)) == {30, 31, EOS}
    states = CONSTRAINT.start(["direct"], [10], [[2]])
    CONSTRAINT.scan(RaggedArray.of([SPELLED[2]], np.int32), states)
    assert as_set(CONSTRAINT.allowed(states)) == {30, 31}


@pytest.mark.parametrize(
    ("mode", "response"),
    [
        ("direct", [12, 20]),  # not a path of the trie
        ("direct", [10, EOS]),  # ends before the item
        ("direct", [6]),  # free text in direct mode
        ("reasoning", [EOS]),
        ("reasoning", [THINK]),
        ("reasoning", [ANSWER]),
        ("reasoning", [20]),  # second level without a first
        ("reasoning", [10, 6]),  # free text inside a semantic ID
        ("reasoning", [END_THINK, END_THINK]),
        ("reasoning", [TOKENIZER]),  # a padding row of the output head
        ("reasoning", [13]),  # a code that no item has
        ("reasoning", [VOCABULARY]),
    ],
)
def test_a_token_outside_the_allowed_set_is_a_violation(mode, response):
    with pytest.raises(ConstraintViolation):
        CONSTRAINT.scan(RaggedArray.of([response], np.int32), CONSTRAINT.start([mode], [20]))


def test_requests_that_cannot_be_answered_are_errors():
    with pytest.raises(ValueError, match="at least 9"):
        CONSTRAINT.start(["reasoning"], [8])
    with pytest.raises(ValueError, match="at least 4"):
        CONSTRAINT.start(["direct"], [3])
    with pytest.raises(ValueError, match="all 6 items are excluded"):
        CONSTRAINT.start(["direct"], [9], [range(6)])
    with pytest.raises(ValueError, match="unknown mode"):
        CONSTRAINT.start(["fast"], [9])
