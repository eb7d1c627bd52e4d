"""Beam search against the enumeration of all items, one plain forward pass each; merging against a dictionary."""

import copy
import math

import numpy as np
import pytest
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.ranking import beam_search, merge_chains


def enumerated(tiny, prompt, terminator):
    """log p(item) of every item of the catalogue, without a cache."""
    spelled = [[*tokens, terminator] for tokens in tiny.builder.item_tokens]
    scores = np.zeros(len(spelled))
    with torch.inference_mode():
        for row, tokens in enumerate(spelled):
            logits = tiny.model(torch.tensor([[*prompt, *tokens]])).logits[0].double()
            for place, token in enumerate(tokens):
                options = sorted({other[place] for other in spelled if other[:place] == tokens[:place]})
                at = logits[len(prompt) - 1 + place]
                scores[row] += float(at[token] - at[options].logsumexp(dim=0))
    return scores


@pytest.fixture(scope="module")
def prompts(tiny):
    """Prompts of unequal lengths, in both modes; the answer's semantic ID comes next."""
    histories = [[1, 2, 3, 4], [5], [9, 30, 31], [7] * 12]
    modes = ["direct", "reasoning", "direct", "reasoning"]
    tokens = tiny.constraint.tokens
    chain = [tokens.think_close, tokens.answer_open]
    built = [
        np.array([*tiny.builder.prompt(h, m), *(chain if m == "reasoning" else [])])
        for h, m in zip(histories, modes, strict=True)
    ]
    assert len({len(prompt) for prompt in built}) > 2
    return built


@pytest.fixture(scope="module", params=DEVICES)
def language_model(tiny, request):
    """The tiny model on a device; what is expected of it is computed on the CPU."""
    return copy.deepcopy(tiny.model).to(request.param)


@pytest.mark.parametrize("end", ["end_of_sequence", "answer_close"])
def test_a_beam_as_wide_as_the_catalogue_ranks_as_enumeration_does(tiny, language_model, prompts, end):
    terminator = getattr(tiny.constraint.tokens, end)
    trie = tiny.constraint.trie
    ends = trie.walk(tiny.index.codes_IL[[5, 9]], tiny.index.lengths_I[[5, 9]])
    assert trie.child_count(ends).tolist() == [2, 2], "items that begin others belong into this test"
    items, scores = beam_search(
        language_model, tiny.constraint, prompts, [[]] * len(prompts), width=len(tiny.index) + 5, terminator=terminator
    )
    assert items.shape == scores.shape == (len(prompts), len(tiny.index))
    assert items.dtype == np.int32
    assert scores.dtype == np.float32
    for user, prompt in enumerate(prompts):
        expected = enumerated(tiny, prompt.tolist(), terminator)
        assert abs(np.exp(expected).sum() - 1) < 1e-6
        assert sorted(items[user].tolist()) == list(range(len(tiny.index)))
        np.testing.assert_allclose(scores[user], expected[items[user]], atol=1e-4)
        assert (np.diff(scores[user]) <= 0).all()


def test_excluded_items_are_passed_over_and_the_others_keep_their_scores(tiny, language_model, prompts):
    terminator = tiny.constraint.tokens.end_of_sequence
    # An item that begins others without them, one below such an item, a whole group of colliding items, nothing.
    colliding = [
        row for row in range(len(tiny.index)) if (tiny.index.codes_IL[row, :4] == tiny.index.codes_IL[0, :4]).all()
    ]
    assert {0, 1, 2} <= set(colliding)
    excluded = [[5], [30, 9], colliding, []]
    items, scores = beam_search(
        language_model, tiny.constraint, prompts, excluded, width=len(tiny.index), terminator=terminator
    )
    for user, prompt in enumerate(prompts):
        left = sorted(set(range(len(tiny.index))) - set(excluded[user]))
        ranked = items[user][items[user] >= 0]
        assert sorted(ranked.tolist()) == left
        expected = enumerated(tiny, prompt.tolist(), terminator)
        np.testing.assert_allclose(scores[user, : len(left)], expected[ranked], atol=1e-4)
        assert (items[user, len(left) :] == -1).all()
        assert np.isneginf(scores[user, len(left) :]).all()


@pytest.mark.parametrize("width", [1, 4, 12])
def test_a_narrow_beam_repeats_nothing_and_is_the_same_in_a_batch_and_one_by_one(tiny, language_model, prompts, width):
    terminator = tiny.constraint.tokens.end_of_sequence
    excluded = [[3, 4], [], [9], [5, 6, 7]]
    items, scores = beam_search(language_model, tiny.constraint, prompts, excluded, width=width, terminator=terminator)
    assert items.shape == (len(prompts), width)
    for user, prompt in enumerate(prompts):
        alone, alone_scores = beam_search(
            language_model, tiny.constraint, [prompt], [excluded[user]], width=width, terminator=terminator
        )
        assert items[user].tolist() == alone[0].tolist()
        np.testing.assert_allclose(scores[user], alone_scores[0], atol=1e-4)
        ranked = items[user][items[user] >= 0].tolist()
        assert ranked
        assert len(set(ranked)) == len(ranked)
        assert not set(ranked) & set(excluded[user])
        # What a narrow beam finds has its exact score; it may only miss items.
        expected = enumerated(tiny, prompt.tolist(), terminator)
        np.testing.assert_allclose(scores[user, : len(ranked)], expected[ranked], atol=1e-4)


def slow_merge(items_CK, scores_CK, user_of_chain_C, users, width):
    ranked = []
    for user in range(users):
        chains = [chain for chain, owner in enumerate(user_of_chain_C) if owner == user]
        mass: dict[int, float] = {}
        for chain in chains:
            for item, score in zip(items_CK[chain], scores_CK[chain], strict=True):
                if item >= 0:
                    mass[int(item)] = mass.get(int(item), 0.0) + math.exp(float(score)) / len(chains)
        ranked.append(sorted(mass.items(), key=lambda entry: (-entry[1], entry[0]))[:width])
    return ranked


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
def test_merging_equals_adding_up_probabilities_in_a_dictionary(seed, users, chains, beam, width):
    generator = np.random.default_rng(seed)
    user_of_chain = generator.permutation(np.repeat(np.arange(users), chains))
    items = np.stack([generator.permutation(8)[:beam] for _ in user_of_chain]).astype(np.int32)
    scores = -generator.exponential(3.0, items.shape).astype(np.float32)
    short = generator.random(items.shape) < 0.2  # beams that found fewer items than their width
    items[short], scores[short] = -1, -np.inf
    merged, merged_scores = merge_chains(items, scores, user_of_chain, users=users, width=width)
    assert merged.shape == merged_scores.shape == (users, width)
    for user, expected in enumerate(slow_merge(items, scores, user_of_chain, users, width)):
        assert merged[user, : len(expected)].tolist() == [item for item, _ in expected]
        np.testing.assert_allclose(np.exp(merged_scores[user, : len(expected)]), [p for _, p in expected], rtol=1e-5)
        assert (merged[user, len(expected) :] == -1).all()
        assert np.isneginf(merged_scores[user, len(expected) :]).all()


def test_one_chain_merges_to_itself():
    items, scores = np.array([[4, 2, 9]], np.int32), np.array([[-0.5, -1.0, -3.0]], np.float32)
    merged, merged_scores = merge_chains(items, scores, np.array([0]), users=1, width=3)
    assert merged.tolist() == items.tolist()
    np.testing.assert_allclose(merged_scores, scores, rtol=1e-6)


def test_an_item_that_all_chains_know_outranks_one_that_a_single_chain_prefers():
    # Two chains: item 1 has .4 in both, item 0 has .6 in one alone: .4 against .3.
    items = np.array([[0, 1], [1, 2]], np.int32)
    scores = np.log(np.array([[0.6, 0.4], [0.4, 0.2]], np.float32))
    merged, merged_scores = merge_chains(items, scores, np.array([0, 0]), users=1, width=3)
    assert merged.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(np.exp(merged_scores), [[0.4, 0.3, 0.1]], rtol=1e-5)


def test_more_answers_than_items_give_fewer(tiny, language_model):
    """Asked for more than exist, beam search leaves places empty and never invents an item."""
    prompt = np.array(tiny.builder.prompt([1, 2], "direct"))
    seen = np.arange(3, len(tiny.index))
    items, scores = beam_search(
        language_model, tiny.constraint, [prompt], [seen], width=10, terminator=tiny.constraint.tokens.end_of_sequence
    )
    assert sorted(items[0, :3].tolist()) == [0, 1, 2]
    assert (items[0, 3:] == -1).all()
    assert np.isfinite(scores[0, :3]).all()
