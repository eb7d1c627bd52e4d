"""The cache of answers: what is written is read, damage is named, and only what is missing is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from item_index.answer_cache import (
    Answer,
    AnswerWriter,
    AskingReport,
    Failure,
    collect_answers,
    read_answers,
    usable_text,
)
from item_index.input_error import InputError


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', "7", '{"key": "a", "text": "b", "prompt_tokens": "many"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'key': 'k', 'text': 't'})}\n{line}\n")
    with pytest.raises(InputError, match="not an answer") as caught:
        read_answers(tmp_path)
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "a.jsonl"), 1)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with AnswerWriter(tmp_path) as first, AnswerWriter(tmp_path) as second:
        first.write("a", Answer("line\nbreak", 7, 2))
        second.write("b", Answer("ü"))
        first.write("c", Answer(""))
    assert read_answers(tmp_path) == ({"a": Answer("line\nbreak", 7, 2), "b": Answer("ü"), "c": Answer("")}, 0)


def test_answers_without_numbers_of_tokens_count_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"key": "k", "text": "t"}\n')
    assert read_answers(tmp_path)[0] == {"k": Answer("t", 0, 0)}


def test_reports_add_up() -> None:
    first = AskingReport({"a": Failure("blank", "x")}, 1, 2, 3, 4)
    second = AskingReport({"b": Failure("deadline", "y")}, 10, 20, 30, 40)
    assert first + second == AskingReport({**first.failures, **second.failures}, 11, 22, 33, 44)


def test_what_is_missing_is_asked_once_and_tokens_are_counted_apart(tmp_path: Path) -> None:
    with AnswerWriter(tmp_path) as writer:
        writer.write("key of old", Answer("O", 100, 10))
        writer.write("key of nobody's", Answer("N", 9000, 900))
    asked: list[tuple[str, str]] = []

    def ask(questions: Iterable[tuple[str, str]], count: int, cache: Path) -> AskingReport:
        asked.extend(questions)
        assert count == len(asked)
        with AnswerWriter(cache) as writer:
            writer.write("key of new", Answer("W", 5, 6))
        return AskingReport({"key of bad": Failure("server error", "503")}, 4, 2, 8, 9)

    prompts = ["new", None, "old", "bad", "new", "old", "bad"]
    collected = collect_answers(len(prompts), prompts.__getitem__, "key of {}".format, tmp_path, ask)
    assert asked == [("key of new", "new"), ("key of bad", "bad")]
    new, old, bad = Answer("W", 5, 6), Answer("O", 100, 10), Failure("server error", "503")
    assert collected.outcomes == (new, None, old, bad, new, old, bad)
    assert collected.cached == (False, False, True, False, False, True, False)
    assert collected.failures_by_reason == {"server error": 2}
    assert collected.cost == {
        "calls": 4, "retries": 2, "prompt_tokens": 8, "completion_tokens": 9,
        "cached_prompt_tokens": 100, "cached_completion_tokens": 10,
    }  # fmt: skip


def test_nothing_missing_is_nothing_asked(tmp_path: Path) -> None:
    def ask(*_: object) -> AskingReport:
        raise AssertionError("there is nothing to ask")

    collected = collect_answers(2, lambda number: None, str, tmp_path, ask)
    assert collected.outcomes == (None, None)
    assert not any(collected.cost.values())


@pytest.mark.parametrize(
    ("content", "complete", "text"),
    [
        ("  two\nlines ", True, "two\nlines"),
        ("<think>a</think> b <think>c</think>\nd", True, "d"),
        ("<think>a</think>", True, Failure("blank", "the answer is blank")),
        (" <br> ", True, Failure("blank", "the answer is blank")),
        ("whole", False, Failure("cut off", "the answer breaks off after maximum_tokens = 9")),
    ],
)
def test_usable_text(content: str, complete: bool, text: str | Failure) -> None:
    assert usable_text(content, complete=complete, maximum_tokens=9) == text
