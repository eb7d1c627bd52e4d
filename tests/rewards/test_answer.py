from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answer import REWRITE_MARKER, STEP_MARKERS, ParsedAnswer, parse_answer

# A vocabulary of words, structure tokens and three codes on each of five levels.
WORDS = ("because", "music", "guitar", *STEP_MARKERS, REWRITE_MARKER)
STRUCTURE = ("</think>", "<answer>", "</answer>", "<end>")
CODES = tuple(f"{letter}{code}" for letter in "abcde" for code in range(3))
VOCABULARY = {token: number for number, token in enumerate((*WORDS, *STRUCTURE, *CODES))}
SPELLINGS = tuple(VOCABULARY)


@dataclass(frozen=True)
class Special:
    think_close: int = VOCABULARY["</think>"]
    answer_open: int = VOCABULARY["<answer>"]
    answer_close: int = VOCABULARY["</answer>"]
    end_of_sequence: int = VOCABULARY["<end>"]

    def code_of(self, token: int) -> tuple[int, int] | None:
        spelling = SPELLINGS[token]
        return ("abcde".index(spelling[0]), int(spelling[1])) if spelling in CODES else None


def decode(tokens: Sequence[int]) -> str:
    return " ".join(SPELLINGS[token] for token in tokens)


def parse(text: str, mode: str = "reasoning", **settings: object) -> ParsedAnswer:
    words = text.replace(REWRITE_MARKER, REWRITE_MARKER.replace(" ", "_")).split()
    tokens = [VOCABULARY[word.replace("_", " ")] for word in words]
    return parse_answer(tokens, mode=mode, special=Special(), decode=decode, **settings)  # type: ignore[arg-type]


STEPS = "Evidence: guitar a1 b1 c1 d1 Preference: music Intent: music Recommendation: guitar"
REWRITING = f"{REWRITE_MARKER} a1 b1 c1 d1"
GOOD = f"{STEPS} </think> {REWRITING} <answer> a1 b2 c0 d1 </answer> <end>"


def test_well_formed_reasoning() -> None:
    assert parse(GOOD) == ParsedAnswer(codes=(1, 2, 0, 1), well_formed=True, problem="")


def test_collision_code_is_part_of_the_answer() -> None:
    assert parse(GOOD.replace("d1 </answer>", "d1 e2 </answer>")) == ParsedAnswer((1, 2, 0, 1, 2), True, "")


def test_end_of_sequence_is_optional_and_ends_the_response() -> None:
    assert parse(GOOD.removesuffix(" <end>")).well_formed
    assert parse(f"{GOOD} </think> music").well_formed
    assert parse("a1 b2 c0 d1", "direct").well_formed
    assert parse("a1 b2 c0 d1 <end> music", "direct") == ParsedAnswer((1, 2, 0, 1), True, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD.replace("</think> ", ""), "not closed"),
        (GOOD.replace("</think>", "</think> </think>"), "closed 2 times"),
        (GOOD.replace("<end>", "</think> <end>"), "closed 2 times"),
        (f"</think> {REWRITING} <answer> a1 b2 c0 d1 </answer> <end>", "0 tokens"),
        *((GOOD.replace(marker, "music"), f"'{marker}' is missing") for marker in STEP_MARKERS),
        (
            GOOD.replace("Evidence:", "X").replace("Preference:", "Evidence:").replace("X", "Preference:"),
            "out of order",
        ),
        (GOOD.replace("Recommendation: guitar </think>", "guitar music </think> Recommendation:"), "'Recommendation:'"),
        (GOOD.replace(REWRITE_MARKER, "music"), "between the think block and the answer block"),
        (f"{REWRITE_MARKER} {GOOD.replace(REWRITE_MARKER, 'music')}", "between the think block and the answer block"),
        (GOOD.replace("d1 </answer>", "d1 a1 b1 c1 d1 </answer>"), "not exactly one"),
        (GOOD.replace("<answer> a1", "<answer> music a1"), "not exactly one"),
        (GOOD.replace(" </answer>", " music </answer>"), "not exactly one"),
        (GOOD.replace(" </answer>", ""), "answer block is not closed"),
    ],
)
def test_malformed_reasoning_keeps_its_codes(text: str, problem: str) -> None:
    parsed = parse(text)
    assert not parsed.well_formed
    assert problem in parsed.problem
    assert parsed.codes == (1, 2, 0, 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{STEPS} </think> {REWRITING} a1 b2 c0 d1 <end>", "no answer block"),
        (f"{STEPS} </think> {REWRITING} <answer> music </answer>", "no semantic ID"),
        (f"{STEPS} </think> {REWRITING} <answer> b2 c0 d1 </answer>", "no semantic ID"),
        (f"{STEPS} </think> {REWRITING} <answer>", "no semantic ID"),
        (f"{STEPS} </think> {REWRITING} <answer> </answer> a1 b2 c0 d1", "no semantic ID"),
        ("", "not closed"),
    ],
)
def test_reasoning_without_an_answer(text: str, problem: str) -> None:
    parsed = parse(text)
    assert parsed.codes is None
    assert not parsed.well_formed
    assert problem in parsed.problem


def test_codes_stop_where_the_levels_break() -> None:
    parsed = parse(GOOD.replace("a1 b2 c0 d1 </answer>", "a1 b2 d1 </answer>"))
    assert (parsed.codes, parsed.well_formed) == ((1, 2), False)


def test_first_of_two_answer_blocks_counts() -> None:
    second = "<answer> a0 b0 c0 d0 </answer>"
    assert parse(GOOD.replace("<end>", f"{second} <end>")) == ParsedAnswer((1, 2, 0, 1), True, "")
    inside = parse(f"{STEPS} {second} </think> {REWRITING} <answer> a1 b2 c0 d1 </answer> <end>")
    assert (inside.codes, inside.well_formed) == ((0, 0, 0, 0), False)
    assert "inside the think block" in inside.problem


def test_minimum_of_think_tokens_counts_the_tokens_before_the_closing() -> None:
    bare = f"{' '.join(STEP_MARKERS)} </think> {REWRITING} <answer> a1 b2 c0 d1 </answer> <end>"
    assert not parse(bare).well_formed
    assert not parse(bare, minimum_think_tokens=5).well_formed
    assert parse(bare, minimum_think_tokens=4).well_formed


@pytest.mark.parametrize(("text", "mode"), [(GOOD, "reasoning"), ("a1 b2 c0 d1 <end>", "direct")])
def test_forced_closing_is_not_well_formed(text: str, mode: str) -> None:
    parsed = parse(text, mode, forced=True)
    assert (parsed.codes, parsed.well_formed) == ((1, 2, 0, 1), False)
    assert "forced" in parsed.problem


@pytest.mark.parametrize(
    ("text", "codes", "well_formed"),
    [
        ("a1 b2 c0 d1 <end>", (1, 2, 0, 1), True),
        ("a1 b2 c0 d1 e1 <end>", (1, 2, 0, 1, 1), True),
        ("a1 b2 c0 d1 music <end>", (1, 2, 0, 1), False),
        ("a1 b2 c0 d1 a1 b2 c0 d1 <end>", (1, 2, 0, 1), False),
        ("music a1 b2 c0 d1 <end>", None, False),
        ("b2 c0 d1 <end>", None, False),
        ("a1 c0 <end>", (1,), False),
        ("<end>", None, False),
        ("", None, False),
        (GOOD, None, False),
    ],
)
def test_direct(text: str, codes: tuple[int, ...] | None, well_formed: bool) -> None:
    parsed = parse(text, "direct")
    assert (parsed.codes, parsed.well_formed) == (codes, well_formed)
    assert bool(parsed.problem) != well_formed


def test_token_arrays_give_plain_integers() -> None:
    tokens = np.array([VOCABULARY[word] for word in ("a1", "b2", "c0", "d1", "<end>")], dtype=np.int32)
    parsed = parse_answer(tokens, mode="direct", special=Special(), decode=decode)  # type: ignore[arg-type]
    assert parsed == ParsedAnswer((1, 2, 0, 1), True, "")
    assert all(type(code) is int for code in parsed.codes or ())


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown mode 'thinking'"):
        parse(GOOD, "thinking")


@given(st.lists(st.integers(0, len(SPELLINGS) - 1), max_size=40), st.sampled_from(["direct", "reasoning"]))
def test_any_response_parses(tokens: list[int], mode: str) -> None:
    parsed = parse_answer(tokens, mode=mode, special=Special(), decode=decode)  # type: ignore[arg-type]
    assert parsed.well_formed == (parsed.problem == "")
    if parsed.well_formed:
        assert parsed.codes


@given(st.data())
def test_damage_never_makes_a_response_well_formed_without_its_parts(data: st.DataObject) -> None:
    words = GOOD.replace(REWRITE_MARKER, "Rewritten_history:").split()
    required = {"</think>", "<answer>", "</answer>", "Rewritten_history:", *STEP_MARKERS}
    dropped = data.draw(st.sampled_from([place for place, word in enumerate(words) if word in required]))
    assert not parse(" ".join(words[:dropped] + words[dropped + 1 :])).well_formed
