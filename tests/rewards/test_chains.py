"""Figures of reasoning chains against hand-written responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answer import REWRITE_MARKER, STEP_MARKERS, parse_answer
from rewards.chains import CHAIN, chain_figures, chain_metrics, semantic_ids_in

CODES = tuple(f"{letter}{code}" for letter in "abc" for code in range(3))
WORDS = ("music", "drama", *STEP_MARKERS, *REWRITE_MARKER.split())
SPELLINGS = (*WORDS, "</think>", "<answer>", "</answer>", "<end>", *CODES)
TOKENS = {spelling: token for token, spelling in enumerate(SPELLINGS)}


class Special:
    think_close, answer_open = TOKENS["</think>"], TOKENS["<answer>"]
    answer_close, end_of_sequence = TOKENS["</answer>"], TOKENS["<end>"]

    @staticmethod
    def code_of(token: int) -> tuple[int, int] | None:
        spelling = SPELLINGS[token]
        return ("abc".index(spelling[0]), int(spelling[1])) if spelling in CODES else None


def decode(tokens: Sequence[int]) -> str:
    return " ".join(SPELLINGS[token] for token in tokens)


def tokens_of(text: str) -> list[int]:
    return [TOKENS[word] for word in text.split()]


HISTORY = {(0, 0), (0, 1, 2), (2, 2)}


def figures(text: str) -> tuple[int, int, bool, int, int]:
    return chain_figures(tokens_of(text), history=HISTORY, special=Special(), decode=decode).item()


STEPS = "Evidence: music Preference: drama Intent: drama Recommendation: music"
GOOD = f"{STEPS} </think> {REWRITE_MARKER} a0 b0 c1 a0 b1 c2 a2 b2 <answer> a1 b1 </answer> <end>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, (8, 4, True, 3, 1)),  # a0 b0 c1 is not the history's a0 b0
        (GOOD.replace("c1 a0", "a0"), (8, 4, True, 3, 0)),
        (GOOD.replace("Intent:", "music"), (8, 3, False, 3, 1)),
        (GOOD.replace("Evidence:", "Intent:", 1).replace("Intent: drama", "Evidence: drama"), (8, 4, False, 3, 1)),
        ("</think> <answer> a1 b1 </answer> <end>", (0, 0, False, 0, 0)),
        (f"{STEPS} a0 b0 </think> {REWRITE_MARKER} <answer> a1 b1 </answer>", (10, 4, True, 0, 0)),  # not rewritten
        (f"{STEPS} </think> a0 b0 <answer> a1 b1 </answer>", (8, 4, True, 1, 0)),  # without its marker
        (f"{STEPS} </think> a0 b0 a0 b0 music b1 a0 <answer>", (8, 4, True, 3, 1)),  # the broken one is foreign
        (f"{STEPS} <answer> a1 b1 </answer> </think> a0 b0 <end>", (8, 4, True, 0, 0)),  # never closed before it
        (f"{STEPS} music", (9, 4, True, 0, 0)),
        (f"music <end> {STEPS} </think> a0 b0", (1, 0, False, 0, 0)),
        ("", (0, 0, False, 0, 0)),
    ],
)
def test_by_hand(text: str, expected: tuple[int, int, bool, int, int]) -> None:
    assert figures(text) == expected


def test_token_arrays_are_taken_as_they_come() -> None:
    array = np.array(tokens_of(GOOD), dtype=np.int32)
    read = chain_figures(array, history=HISTORY, special=Special(), decode=decode)  # type: ignore[arg-type]
    assert read.dtype == CHAIN
    assert read.item() == figures(GOOD)


def test_semantic_ids_are_read_level_by_level() -> None:
    assert semantic_ids_in(tokens_of("music a0 b1 c2 a1 a2 b0 music c1 b1 a0 c1 b0"), Special()) == [
        (0, 1, 2), (1,), (2, 0), (0,),
    ]  # fmt: skip


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 2) | st.tuples(*[st.integers(0, 2)] * 3), max_size=8))
def test_what_is_spelled_is_read_back(items: list[tuple[int, ...]]) -> None:
    text = " ".join(f"{'abc'[level]}{code}" for codes in items for level, code in enumerate(codes))
    assert semantic_ids_in(tokens_of(text), Special()) == items


@given(st.lists(st.integers(0, len(SPELLINGS) - 1), max_size=40))
def test_any_response_has_figures_and_a_well_formed_one_is_complete(tokens: list[int]) -> None:
    for response in (tokens, [*tokens_of(STEPS), *tokens]):
        chain = chain_figures(response, history=HISTORY, special=Special(), decode=decode)
        assert 0 <= chain["foreign_items"] <= chain["rewritten_items"]
        assert chain["markers"] == 4 or not chain["complete"]
        parsed = parse_answer(response, mode="reasoning", special=Special(), decode=decode, minimum_think_tokens=5)  # type: ignore[arg-type]
        assert not parsed.well_formed or (chain["complete"] and chain["think_tokens"] >= 5)


def test_metrics_by_hand() -> None:
    chains = np.array(
        [(0, 0, False, 0, 0), (10, 4, True, 6, 3), (20, 4, False, 2, 0), (50, 2, False, 0, 0)], dtype=CHAIN
    )
    assert chain_metrics(chains, minimum_think_tokens=10) == pytest.approx(
        {
            "think_tokens": 20.0,
            "think_tokens_10": 3.0,  # between the first and the second of four: 0.3 of the way
            "think_tokens_90": 41.0,  # 0.7 of the way from 20 to 50
            "empty_share": 0.25,
            "complete_share": 0.25,
            "markers_share": 10 / 16,
            "rewritten_items": 2.0,
            "foreign_share": 3 / 8,
        }
    )
    assert chain_metrics(chains.reshape(2, 2), minimum_think_tokens=11)["empty_share"] == 0.5
    assert chain_metrics(chains, minimum_think_tokens=0)["empty_share"] == 0.0


def test_what_there_is_nothing_of_has_no_share() -> None:
    assert chain_metrics(np.zeros((0, 4), CHAIN), minimum_think_tokens=8) == {}
    collapsed = chain_metrics(np.zeros((3, 2), CHAIN), minimum_think_tokens=8)
    assert collapsed["empty_share"] == 1.0
    assert collapsed["complete_share"] == collapsed["rewritten_items"] == 0.0
    assert "foreign_share" not in collapsed
