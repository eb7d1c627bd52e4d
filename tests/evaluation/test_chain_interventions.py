"""Interventions on chains and histories, on prompts and chains that are put together by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.chain_interventions import CHAIN_INTERVENTIONS, cited_items, intervene
from item_index.ragged import RaggedArray

WORD = 1  # a token id that is neither code nor structure


@pytest.fixture(scope="module")
def changed(tiny):
    """Contexts and users after an intervention on chains that cite the given items."""
    tokens, builder = tiny.constraint.tokens, tiny.builder
    rows = {
        tuple(codes[:length].tolist()): row
        for row, (codes, length) in enumerate(zip(tiny.index.codes_IL, tiny.index.lengths_I, strict=True))
    }

    def chain(number, cited):
        spelled = [token for item in cited for token in builder.item_tokens[item]]
        return [*[WORD] * (number + 1), tokens.think_close, *spelled, tokens.answer_open]

    def run(intervention, histories, citations, seed=0):
        chains = [chain(number, cited) for number, cited in enumerate(citations)]
        opened = intervene(
            intervention, RaggedArray.of(chains, np.int32), [np.array(one, np.int64) for one in histories],
            prompt_of=lambda history: builder.prompt(history, "reasoning"), item_of_codes=rows.get, tokens=tokens,
            seed=seed,
        )  # fmt: skip
        return [row.tolist() for row in opened.contexts], opened.user_C.tolist(), chains

    return run


@pytest.fixture(scope="module")
def prompt(tiny):
    return lambda history: tiny.builder.prompt(history, "reasoning")


HISTORIES = [[3, 8, 1, 6], [2, 9, 30, 31], [7]]
CITATIONS = [[8, 6], [3], [2, 31], [], [7], [5]]  # two chains a user; 3 stands in the history, 5 does not


def test_cited_items_leave_the_prompt_and_the_chain_stays(changed, prompt):
    contexts, users, chains = changed("cited_items_removed", HISTORIES, CITATIONS)
    left = [[3, 1], [8, 1, 6], [9, 30], [2, 9, 30, 31], [], [7]]
    assert users == [0, 0, 1, 1, 2, 2]
    assert contexts == [[*prompt(history), *chain] for history, chain in zip(left, chains, strict=True)]


def test_as_many_of_the_other_items_are_removed_or_all_that_are_left(changed, prompt):
    histories = [[3, 8, 1, 6, 20], [7, 4]]
    citations = [[8, 6], [], [7], [7, 4]]
    contexts, _, chains = changed("other_items_removed", histories, citations)
    for number, (context, chain) in enumerate(zip(contexts, chains, strict=True)):
        history, cited = histories[number // 2], citations[number]
        others = [item for item in history if item not in cited]
        prefix = context[: -len(chain)]
        assert context[-len(chain) :] == chain
        choices = [
            [item for item in history if item in cited or item in kept]
            for kept in map(set, itertools.combinations(others, max(len(others) - len(cited), 0)))
        ]
        assert prefix in [prompt(choice) for choice in choices]


def test_a_deleted_chain_leaves_the_closed_think_block_once_for_each_user(changed, prompt, tiny):
    contexts, users, _ = changed("deleted_chains", HISTORIES, CITATIONS)
    tokens = tiny.constraint.tokens
    assert users == [0, 1, 2]
    assert contexts == [[*prompt(history), tokens.think_close, tokens.answer_open] for history in HISTORIES]


@settings(max_examples=25, deadline=None)
@given(users=st.integers(2, 7), each=st.integers(1, 3), seed=st.integers(0, 99))
def test_swapped_chains_are_all_of_one_other_user(changed, prompt, users, each, seed):
    histories = [[user, user + 8] for user in range(users)]
    contexts, of, chains = changed("swapped_chains", histories, [[]] * users * each, seed)
    assert of == np.repeat(np.arange(users), each).tolist()
    given_by = []
    for user in range(users):
        start = prompt(histories[user])
        rows = contexts[user * each : (user + 1) * each]
        assert all(row[: len(start)] == start for row in rows)
        numbers = [chains.index(row[len(start) :]) for row in rows]
        assert numbers == [numbers[0] + place for place in range(each)]
        assert numbers[0] % each == 0
        given_by.append(numbers[0] // each)
    assert sorted(given_by) == list(range(users))
    assert all(giver != user for user, giver in enumerate(given_by))


def test_one_user_cannot_swap(changed):
    with pytest.raises(ValueError, match="one user"):
        changed("swapped_chains", [[1, 2]], [[1], [2]])


def test_the_seed_alone_decides_what_is_drawn(changed):
    for intervention in CHAIN_INTERVENTIONS:
        assert changed(intervention, HISTORIES, CITATIONS, 4) == changed(intervention, HISTORIES, CITATIONS, 4)
    drawn = [changed("other_items_removed", [list(range(20))], [[1, 2, 3]], seed)[0] for seed in range(8)]
    assert len({str(contexts) for contexts in drawn}) > 1


def test_codes_that_name_no_item_are_not_cited(tiny):
    tokens, spelled = tiny.constraint.tokens, tiny.builder.item_tokens
    chain = np.array([WORD, *spelled[4], WORD, *spelled[9][:1], tokens.answer_open])
    rows = {(*tiny.index.codes_IL[4][: tiny.index.lengths_I[4]].tolist(),): 4}
    assert cited_items(chain, tokens, rows.get) == {4}
