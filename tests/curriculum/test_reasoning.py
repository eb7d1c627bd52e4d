from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.reasoning import MetadataTeacher, ReasoningTrace, quality_problem
from item_index.catalogue import Catalogue
from rewards.answer import STEP_MARKERS


def catalogue_of(
    categories: list[tuple[str, ...]], titles: list[str] | None = None, brands: list[str] | None = None
) -> Catalogue:
    rows = range(len(categories))
    return Catalogue(
        item_ids=tuple(rows),
        titles=tuple(titles or [f"Title Number {row}" for row in rows]),
        descriptions=("",) * len(categories),
        categories=tuple(categories),
        brands=tuple(brands or [""] * len(categories)),
    )


KINDS = catalogue_of(
    [
        ("Drama",), ("Drama", "Romance"), ("Comedy",), ("Sci-Fi", "Action"), ("Romance",), (), ("Action",),
        ("Drama", "Comedy", "Romance", "Action", "Sci-Fi"),
    ]
)  # fmt: skip


def test_hand_written_trace() -> None:
    trace = MetadataTeacher(KINDS).trace([0, 0, 1, 2, 4, 3, 6, 3], target=1)
    assert trace.steps == (
        "Evidence: 8 items, mostly action 3, drama 3, romance 2; lately action 3, sci-fi 2.",
        "Preference: shifting taste for action and drama, rising interest in action, fading interest in drama.",
        "Intent: the next item is likely action or sci-fi.",
        "Recommendation: an item of drama and romance.",
    )
    assert trace.rewritten == (0, 0, 1, 4)
    assert trace.removed == 4


def test_steady_taste_and_short_history() -> None:
    trace = MetadataTeacher(KINDS).trace([0, 1], target=2)
    assert trace.steps == (
        "Evidence: 2 items, mostly drama 2, romance 1.",
        "Preference: steady taste for drama and romance.",
        "Intent: the next item is likely drama or romance.",
        "Recommendation: an item of comedy.",
    )
    assert trace.rewritten == (1,)  # nothing shares a category: the latest item
    assert trace.removed == 1


def test_brands() -> None:
    catalogue = catalogue_of([("Strings",), ("Strings", "Guitars"), ("Drums",)], brands=["Acme", "ACME ", "Bonk, Ltd."])
    trace = MetadataTeacher(catalogue).trace([0, 1, 2], target=2)
    assert trace.steps[0] == "Evidence: 3 items, mostly strings 2, drums 1, guitars 1; often by acme 2."
    assert trace.steps[3] == "Recommendation: an item of drums by bonk ltd."
    assert trace.rewritten == (2,)


def test_items_without_categories() -> None:
    teacher = MetadataTeacher(catalogue_of([(), ("Drama",), ("Comedy",)]))
    trace = teacher.trace([0, 0], target=0)
    assert trace.steps == (
        "Evidence: 2 items, no stated kind.",
        "Preference: no clear taste.",
        "Intent: the next item is likely of no clear kind.",
        "Recommendation: an item of no stated kind.",
    )
    assert trace.rewritten == (0,)
    assert trace.removed == 1


def test_target_is_described_by_its_rarest_categories_and_the_rewriting_goes_by_these() -> None:
    catalogue = catalogue_of(
        [("All", "Wide", "Mid", "Fine", "Own")]
        + [("All", "Wide")] * 4
        + [("All", "Mid")] * 2
        + [("All", "Fine"), ("All",)]
    )
    trace = MetadataTeacher(catalogue).trace([1, 5, 7, 8, 6, 2], target=0)
    assert trace.steps[3] == "Recommendation: an item of mid and fine and own."
    assert trace.rewritten == (5, 7, 6)
    assert "all" not in " ".join(trace.steps).split()  # every item has it


def test_rewriting_keeps_the_latest() -> None:
    trace = MetadataTeacher(KINDS, rewritten_history_items=2).trace([0, 1, 2, 0, 4, 3], target=1)
    assert trace.rewritten == (0, 4)
    assert trace.removed == 4


def test_markup_and_special_tokens_in_categories_do_not_come_through() -> None:
    catalogue = catalogue_of([("<|a_1|>Rock &amp; Roll", "</think>"), ("Jazz; Blues.",), ()])
    text = " ".join(MetadataTeacher(catalogue).trace([0, 1], target=1).steps)
    assert "<" not in text
    assert "rock & roll 1" in text
    assert "an item of jazz blues." in text


def test_render() -> None:
    trace = ReasoningTrace(("Evidence: a.", "Preference: b.", "Intent: c.", "Recommendation: d."), (3, 1), 0)
    think, rewriting = trace.render(lambda item: f"<|a_{item}|>")
    assert think == "Evidence: a. Preference: b. Intent: c. Recommendation: d."
    assert rewriting == "Rewritten history: <|a_3|><|a_1|>"


names = st.sampled_from(["Drama", "Comedy", "Film-Noir", "Children's", "War", "Toys & Games"])
catalogues = st.lists(
    st.tuples(st.lists(names, max_size=5).map(tuple), st.sampled_from(["", "Acme", "Bonk"])), min_size=2, max_size=8
).map(lambda items: catalogue_of([kinds for kinds, _ in items], brands=[brand for _, brand in items]))


@given(catalogues, st.data())
def test_properties(catalogue: Catalogue, data: st.DataObject) -> None:
    row = st.integers(0, len(catalogue) - 1)
    history = data.draw(st.lists(row, min_size=1, max_size=25))
    target, other_target, limit = data.draw(row), data.draw(row), data.draw(st.integers(1, 8))
    teacher = MetadataTeacher(catalogue, rewritten_history_items=limit)
    trace = teacher.trace(history, target)
    assert trace == MetadataTeacher(catalogue, rewritten_history_items=limit).trace(history, target)
    assert trace.steps[:3] == teacher.trace(history, other_target).steps[:3]
    assert all(step.startswith(marker) for marker, step in zip(STEP_MARKERS, trace.steps, strict=True))
    assert quality_problem(trace, catalogue, target) is None

    remaining = iter(history)
    assert all(item in remaining for item in trace.rewritten)  # a subsequence
    assert 1 <= len(trace.rewritten) <= limit
    assert trace.removed == len(history) - len(trace.rewritten)
    described = trace.steps[3].removeprefix("Recommendation: an item of ")
    if len(trace.rewritten) > 1:
        assert all(any(name.lower() in described for name in catalogue.categories[item]) for item in trace.rewritten)


def test_titles_of_the_target_do_not_change_the_trace() -> None:
    renamed = replace(KINDS, titles=tuple("Other" for _ in KINDS.titles))
    assert MetadataTeacher(KINDS).trace([0, 1, 3], 7) == MetadataTeacher(renamed).trace([0, 1, 3], 7)


def test_bad_input_is_refused() -> None:
    teacher = MetadataTeacher(KINDS)
    with pytest.raises(ValueError, match="at least one item"):
        teacher.trace([], 0)
    with pytest.raises(ValueError, match="item 8 is not a row of the 8 items"):
        teacher.trace([0], 8)
    with pytest.raises(ValueError, match="item -1"):
        teacher.trace([-1], 0)
    with pytest.raises(ValueError, match="rewritten_history_items"):
        MetadataTeacher(KINDS, rewritten_history_items=0)


GOOD = ReasoningTrace(
    ("Evidence: mostly drama 3, heat 1.", "Preference: steady drama.", "Intent: drama.", "Recommendation: drama."),
    (0,),
    1,
)


def problem_with(*, title: str = "Nothing Of The Kind", place: int = 0, step: str | None = None) -> str | None:
    steps = list(GOOD.steps)
    if step is not None:
        steps[place] = step
    catalogue = catalogue_of([("Drama",), ("War",)], titles=[title, "Another"], brands=["Metallica", ""])
    return quality_problem(replace(GOOD, steps=(steps[0], steps[1], steps[2], steps[3])), catalogue, 0)


def test_gate_accepts_and_names_missing_steps() -> None:
    assert problem_with() is None
    assert problem_with(place=1, step="A steady taste.") == "step marker 'Preference:' is missing"
    assert problem_with(place=1, step="") == "step marker 'Preference:' is missing"
    assert problem_with(place=2, step="Intent: ") == "the step 'Intent:' is empty"
    assert problem_with(place=0, step="Evidence: a. Intent: b.") == "step marker 'Intent:' occurs more than once"
    swapped = replace(GOOD, steps=(GOOD.steps[1], GOOD.steps[0], *GOOD.steps[2:]))
    assert quality_problem(swapped, KINDS, 0) == "step marker 'Evidence:' is out of order"


@pytest.mark.parametrize(
    ("title", "step"),
    [
        ("Heat (1995)", "Evidence: someone who saw heat."),
        ("Star Wars", "Evidence: loves STAR   WARS, and more."),
        ("M*A*S*H (1970)", "Evidence: watched M*A*S*H."),
        ("Tom &amp; Jerry", "Evidence: watched Tom & Jerry"),
        ("What Now?", "Evidence: what now? and so on"),
    ],
)
def test_gate_rejects_the_title(title: str, step: str) -> None:
    assert problem_with(title=title, step=step) == "the target's title is named"


@pytest.mark.parametrize(
    ("title", "step"),
    [
        ("Heat", "Evidence: theatre, wheat and heated words."),
        ("It (1990)", "Evidence: it is drama."),
        ("Drama", "Evidence: mostly drama."),
        ("War", "Evidence: mostly war."),  # a category of another item
        ("Metallica", "Evidence: often by metallica."),
        ("Taste (2000)", "Evidence: steady taste."),
        ("187 (1997)", "Evidence: 187 items."),
    ],
)
def test_gate_raises_no_false_alarm(title: str, step: str) -> None:
    assert problem_with(title=title, step=step) is None


def test_every_word_of_the_sentences_is_known_to_the_gate() -> None:
    traces = [MetadataTeacher(KINDS).trace(history, 1) for history in ([5], [0, 0, 1, 2, 4, 3, 6, 3], [0, 1])]
    kinds = {name.lower() for categories in KINDS.categories for name in categories}
    words = {word for trace in traces for word in re.findall(r"[a-z'-]+", " ".join(trace.steps).lower())} - kinds
    for word in words:
        titled = replace(KINDS, titles=(word,) * len(KINDS))
        assert all(quality_problem(trace, titled, 1) is None for trace in traces), word


def test_reasoning_needs_neither_torch_nor_ray() -> None:
    code = "import sys, curriculum.reasoning; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
