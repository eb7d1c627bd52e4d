"""Lessons: the prompt of a language model, the reading of its answers, and what becomes of those that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_index

from curriculum.corpus import build_corpus, load_corpus
from curriculum.interactions import UserSequences
from curriculum.reasoning import MetadataTeacher, user_text_problem
from curriculum.rows import UserText
from curriculum.teachers import (
    PARTS,
    LanguageModelTeacher,
    Lesson,
    UnusableAnswer,
    lesson_prompt,
    metadata_lesson,
    read_lesson,
)
from item_index.answer_cache import Answer, CollectedAnswers, Failure
from item_index.catalogue import Catalogue

TEXTS = ("three dramas", "likes drama", "more drama", "a drama", "drama fan", "good drama")
GOOD = "\n".join(f"{label} {text}" for label, text in zip(PARTS, TEXTS, strict=True))
LESSON = Lesson(
    ("Evidence: three dramas", "Preference: likes drama", "Intent: more drama", "Recommendation: a drama"),
    "drama fan", "good drama",
)  # fmt: skip
ITEMS = 20
CATALOGUE = Catalogue(
    item_ids=tuple(f"item-{row}" for row in range(ITEMS)),
    titles=tuple(f"Tale Number {row}" for row in range(ITEMS)),
    descriptions=("",) * ITEMS,
    categories=tuple((("Drama", "Comedy", "War")[row % 3], ("Old", "New")[row % 2]) for row in range(ITEMS)),
    brands=("",) * ITEMS,
)


def test_the_prompt_of_a_tiny_history() -> None:
    items = Catalogue(
        ("a", "b", "c"), ("Moss &amp; Fern", "<|a_1|>Rain", "Sun"), ("Not shown.",) * 3,
        (("Nature", "Old"), (), ("Sky</think>",)), ("", "", ""),
    )  # fmt: skip
    assert lesson_prompt(items, [1, 0, 1], 2) == (
        "History:\n1. Rain\n2. Moss & Fern (Nature, Old)\n3. Rain\nNext item: Sun (Sky)"
    )


def test_long_titles_are_cut() -> None:
    items = Catalogue(("a",), ("word " * 500,), ("",), (("kind",) * 500,), ("",))
    assert len(lesson_prompt(items, [0], 0).split()) < 120


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"Sure, here it is. Evidence: is below.\n\n{GOOD}\n\n",
        GOOD.replace("\n", "\n\n"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("three dramas", "three\n  dramas"),
        "\n".join(f"**{label}** {text}" for label, text in zip(PARTS, TEXTS, strict=True)),
        "\n".join(f"- {label}\n{text}" for label, text in zip(PARTS, TEXTS, strict=True)),
        "\n".join(f"  ## {label} *{text}*" for label, text in zip(PARTS, TEXTS, strict=True)),
    ],
)
def test_answers_that_read_alike(answer: str) -> None:
    assert read_lesson(answer) == LESSON


def without(place: int) -> str:
    return "\n".join(line for number, line in enumerate(GOOD.split("\n")) if number != place)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "part 'Evidence:' is missing"),
        ("I would rather not.", "part 'Evidence:' is missing"),
        (GOOD.replace("\n", " "), "part 'Preference:' is missing"),
        *((without(place), f"part '{label}' is missing") for place, label in enumerate(PARTS)),
        (GOOD.replace("query:", "Query:"), "part 'query:' is missing"),
        (GOOD.replace("preference:", "Preference:"), "part 'Preference:' occurs more than once"),
        (f"{GOOD}\nIntent: again", "part 'Intent:' occurs more than once"),
        ("\n".join(reversed(GOOD.split("\n"))), "part 'query:' is out of order"),
        (GOOD.replace("likes drama", ""), "part 'Preference:' is empty"),
        (GOOD.replace("good drama", "..."), "part 'query:' is empty"),
        (GOOD.replace("likes drama", "likes <|a_3|>"), "part 'Preference:' holds markup or special tokens"),
        (GOOD.replace("drama fan", "a </think> b"), "part 'preference:' holds markup or special tokens"),
        (GOOD.replace("drama fan", "a \x00 b"), "part 'preference:' holds markup or special tokens"),
    ],
)
def test_answers_that_cannot_be_used_say_why(answer: str, reason: str) -> None:
    with pytest.raises(UnusableAnswer) as caught:
        read_lesson(answer)
    assert str(caught.value) == reason


WORDS = st.text("abcdef ,.'", min_size=1, max_size=40).filter(lambda text: any(map(str.isalnum, text)))


@given(st.lists(WORDS, min_size=6, max_size=6), st.text("abc \n", max_size=30))
def test_what_is_written_is_read(texts: list[str], before: str) -> None:
    lesson = read_lesson(f"{before}\n" + "\n".join(f"{label} {text}" for label, text in zip(PARTS, texts, strict=True)))
    said = [" ".join(text.split()) for text in texts]
    assert lesson.steps == tuple(f"{label} {text}" for label, text in zip(PARTS, said[:4], strict=False))
    assert (lesson.preference, lesson.query) == (said[4], said[5])


JUNK = st.sampled_from([*(f"{label} again" for label in PARTS), "", "word", "<b>", "</think>", "**", ":"])


@given(st.lists(st.tuples(st.integers(0, 6), JUNK), max_size=2), st.permutations(range(6)) | st.just(range(6)))
def test_disturbed_answers_are_either_a_whole_lesson_or_unusable(
    junk: list[tuple[int, str]], order: Sequence[int]
) -> None:
    lines = [GOOD.split("\n")[number] for number in order]
    for place, text in junk:
        lines.insert(place, text)
    whole = list(order) == list(range(6)) and not any(text.endswith("again") for _, text in junk)
    try:
        lesson = read_lesson("\n".join(lines))
    except UnusableAnswer as error:
        reason = str(error)
    else:
        assert whole
        assert all(step.startswith(good) for step, good in zip(lesson.steps, LESSON.steps, strict=True))
        assert lesson.preference.startswith(LESSON.preference)
        assert lesson.query.startswith(LESSON.query)
        assert "<" not in f"{lesson}"
        return
    assert any(f"part '{label}'" in reason for label in PARTS)
    assert not whole or any("<" in text for _, text in junk)


def test_user_texts_may_not_name_the_title_nor_hold_special_tokens() -> None:
    for text, problem in {
        "Likes number 7 and tales.": None,
        "the tale number 7": "a user text names the target's title",
        "Adores Tale  Number 7.": "a user text names the target's title",
        "one like <|a_1|>": "a user text holds a special token",
        "[INST] buy": "a user text holds a special token",
    }.items():
        assert user_text_problem(text, CATALOGUE, 7) == problem
    assert user_text_problem("the tale number 7", CATALOGUE, 8) is None


@pytest.mark.parametrize("part", ["drama fan", "good drama"])
def test_a_lesson_whose_preference_or_query_names_the_title_is_rejected(tmp_path: Path, part: str) -> None:
    naming = Answer(GOOD.replace(part, ", ".join(CATALOGUE.titles)))
    corpus, summary = build(tmp_path, answering([naming, *[Answer(GOOD)] * (TRAIN_TARGETS - 1)], fallback=False))
    assert summary["rejected_traces"] == {"a user text names the target's title": 1}
    assert (summary["teacher"]["rejected"], summary["teacher"]["left_out"]) == (1, 1)
    assert len(corpus.reasoning) == len(corpus.user_texts) == TRAIN_TARGETS - 1


def test_the_metadata_lesson() -> None:
    teacher = MetadataTeacher(CATALOGUE)
    lesson = metadata_lesson(teacher, [0, 3, 4], 1)
    assert lesson.steps == teacher.steps([0, 3, 4], 1)
    assert lesson.preference == "Steady taste for drama and old."
    assert lesson.query == "I want an item of new and comedy."
    # The preference does not see the target, the query sees nothing else.
    assert metadata_lesson(teacher, [0, 3, 4], 8).preference == lesson.preference
    assert metadata_lesson(teacher, [5], 1).query == lesson.query


@pytest.mark.parametrize("title", ["Want", "I", "Taste", "Item"])
def test_the_metadata_lesson_names_no_title_by_its_own_words(title: str) -> None:
    items = Catalogue(("a", "b"), (title, "Other"), ("", ""), (("drama",), ("war",)), ("", ""))
    lesson = metadata_lesson(MetadataTeacher(items), [1], 0)
    assert user_text_problem(f"{lesson.preference} {lesson.query}", items, 0) is None


USERS, LENGTH = 4, 8
SEQUENCES = UserSequences(
    user_ids=tuple(range(USERS)),
    offsets_U1=np.arange(USERS + 1) * LENGTH,
    items=np.concatenate([np.random.default_rng(user).permutation(ITEMS)[:LENGTH] for user in range(USERS)]),
    timestamps=np.arange(USERS * LENGTH),
)
VECTORS = np.random.default_rng(9).normal(size=(ITEMS, 4)).astype(np.float32)
TRAIN_TARGETS = USERS * (LENGTH - 2 - 2)  # two for validation and test, two without history enough


def build(folder: Path, teacher: LanguageModelTeacher | None, rows: int | None = None):
    index = make_index(ITEMS)
    index.save(folder / "index")
    summary = build_corpus(
        folder / "corpus", catalogue=CATALOGUE, sequences=SEQUENCES, index=index, checkpoint=None, history_items=3,
        minimum_history=2, rewritten_history_items=2, reasoning_rows=rows, rl_holdout=0.0, text_vocabulary=300, seed=0,
        teacher=teacher, item_vectors_ID=VECTORS, removed_share=0.3, maximum_think_characters=4000,
        minimum_think_tokens=1,
    )  # fmt: skip
    assert json.loads((folder / "corpus" / "summary.json").read_text())["teacher"] == summary["teacher"]
    return load_corpus(folder / "corpus", folder / "index"), summary


def answering(outcomes: Sequence[Answer | Failure], *, fallback: bool) -> LanguageModelTeacher:
    """A model that gives these outcomes, the last one from its cache."""

    def answer(prompts: Sequence[str]) -> CollectedAnswers:
        assert len(prompts) == len(outcomes) == TRAIN_TARGETS
        cached = tuple(number == len(outcomes) - 1 for number in range(len(outcomes)))
        return CollectedAnswers(tuple(outcomes), cached, {"calls": 20, "prompt_tokens": 30}, torn_lines=1)

    return LanguageModelTeacher("endpoint", answer, fallback=fallback)


OUTCOMES = [
    Failure("deadline", "too late"), Failure("rate limit", "too much"), Failure("deadline", "too late again"),
    Answer("garbage"), Answer(f"{GOOD}\nIntent: b"),
]  # fmt: skip


def test_failed_unusable_and_rejected_targets_are_left_out_and_counted(tmp_path: Path) -> None:
    naming = Answer(GOOD.replace("likes drama", " and ".join(CATALOGUE.titles)))
    outcomes = [*OUTCOMES, naming, *[Answer(GOOD)] * (TRAIN_TARGETS - 6)]
    corpus, summary = build(tmp_path, answering(outcomes, fallback=False))
    accepted = TRAIN_TARGETS - 6
    assert summary["teacher"] == {
        "targets": TRAIN_TARGETS, "asked": TRAIN_TARGETS - 1, "cached": 1,
        "failed": {"deadline": 2, "rate limit": 1},
        "unusable": {"part 'Evidence:' is missing": 1, "part 'Intent:' occurs more than once": 1},
        "rejected": 1, "fell_back": 0, "left_out": 6, "calls": 20, "prompt_tokens": 30, "torn_lines": 1,
        "messages": ["too late", "too much", "too late again"],
    }  # fmt: skip
    assert summary["rejected_traces"] == {"the target's title is named": 1}
    assert summary["rows_by_source"] == {"endpoint": accepted}
    assert len(corpus.reasoning) == len(corpus.user_texts) == summary["reasoning_rows"] == accepted
    assert {example.think for example in corpus.reasoning} == {" ".join(LESSON.steps)}
    assert corpus.user_texts == [UserText(example.position, "drama fan", "good drama") for example in corpus.reasoning]
    metadata = build(tmp_path / "metadata", None)[0]
    positions = [example.position for example in metadata.reasoning]
    assert [example.position for example in corpus.reasoning] == positions[6:], "the same targets, in the same order"


def test_the_fallback_is_the_metadata_teachers_text_and_is_marked(tmp_path: Path) -> None:
    naming = Answer(GOOD.replace("likes drama", " and ".join(CATALOGUE.titles)))
    outcomes = [*OUTCOMES, naming, *[Answer(GOOD)] * (TRAIN_TARGETS - 6)]
    corpus, summary = build(tmp_path, answering(outcomes, fallback=True))
    metadata = build(tmp_path / "metadata", None)[0]
    assert {name: summary["teacher"][name] for name in ("rejected", "fell_back", "left_out")} == {
        "rejected": 1, "fell_back": 6, "left_out": 0,
    }  # fmt: skip
    assert summary["rows_by_source"] == {"metadata": 6, "endpoint": TRAIN_TARGETS - 6}
    assert corpus.reasoning[:6] == metadata.reasoning[:6]
    assert corpus.user_texts[:6] == metadata.user_texts[:6]
    assert {example.source for example in corpus.reasoning[6:]} == {"endpoint"}
    for name in ("reasoning", "user_texts"):
        table = pq.read_table(tmp_path / "corpus" / f"{name}.parquet")
        assert table["source"].to_pylist() == ["metadata"] * 6 + ["endpoint"] * (TRAIN_TARGETS - 6)


def test_the_metadata_teacher_writes_texts_for_the_drawn_targets(tmp_path: Path) -> None:
    corpus, summary = build(tmp_path, None, rows=5)
    teacher = MetadataTeacher(CATALOGUE)
    assert summary["teacher"] == {}
    assert summary["rows_by_source"] == {"metadata": 5}
    assert corpus.user_texts == [
        UserText(example.position, teacher.preference(example.history), teacher.query(example.target))
        for example in corpus.reasoning
    ]


def test_no_answer_at_all_leaves_an_empty_corpus_that_can_be_read(tmp_path: Path) -> None:
    corpus, summary = build(tmp_path, answering([Failure("no connection", "nobody")] * TRAIN_TARGETS, fallback=False))
    assert corpus.reasoning == corpus.user_texts == []
    assert summary["teacher"]["left_out"] == TRAIN_TARGETS
    assert summary["teacher"]["messages"] == ["nobody"] * 5


def test_teachers_need_neither_torch_nor_ray_nor_a_client() -> None:
    code = "import sys, curriculum.teachers; sys.exit(bool({'torch', 'ray', 'openai'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
