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
    assert MetadataTeacher(KINDS).steps([0, 0, 1, 2, 4, 3, 6, 3], target=1) == (
        "Evidence: 8 items, mostly action 3, drama 3, romance 2; lately action 3, sci-fi 2.",
        "Preference: shifting taste for action and drama, rising interest in action, fading interest in drama.",
        "Intent: the next item is likely action or sci-fi.",
        "Recommendation: an item of drama and romance.",
    )


def test_steady_taste_and_short_history() -> None:
    assert MetadataTeacher(KINDS).steps([0, 1], target=2) == (
        "Evidence: 2 items, mostly drama 2, romance 1.",
        "Preference: steady taste for drama and romance.",
        "Intent: the next item is likely drama or romance.",
        "Recommendation: an item of comedy.",
    )


def test_brands() -> None:
    catalogue = catalogue_of([("Strings",), ("Strings", "Guitars"), ("Drums",)], brands=["Acme", "ACME ", "Bonk, Ltd."])
    steps = MetadataTeacher(catalogue).steps([0, 1, 2], target=2)
    assert steps[0] == "Evidence: 3 items, mostly strings 2, drums 1, guitars 1; often by acme 2."
    assert steps[3] == "Recommendation: an item of drums by bonk ltd."


def test_items_without_categories() -> None:
    teacher = MetadataTeacher(catalogue_of([(), ("Drama",), ("Comedy",)]))
    assert teacher.steps([0, 0], target=0) == (
        "Evidence: 2 items, no stated kind.",
        "Preference: no clear taste.",
        "Intent: the next item is likely of no clear kind.",
        "Recommendation: an item of no stated kind.",
    )


def test_target_is_described_by_its_rarest_categories() -> None:
    catalogue = catalogue_of(
        [("All", "Wide", "Mid", "Fine", "Own")]
        + [("All", "Wide")] * 4
        + [("All", "Mid")] * 2
        + [("All", "Fine"), ("All",)]
    )
    steps = MetadataTeacher(catalogue).steps([1, 5, 7, 8, 6, 2], target=0)
    assert steps[3] == "Recommendation: an item of mid and fine and own."
    assert "all" not in " ".join(steps).split()  # every item has it


def test_markup_and_special_tokens_in_categories_do_not_come_through() -> None:
    catalogue = catalogue_of([("<|a_1|>Rock &amp; Roll", "</think>"), ("Jazz; Blues.",), ()])
    text = " ".join(MetadataTeacher(catalogue).steps([0, 1], target=1))
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
    target, other_target = data.draw(row), data.draw(row)
    teacher = MetadataTeacher(catalogue)
    steps = teacher.steps(history, target)
    assert steps == MetadataTeacher(catalogue).steps(history, target)
    assert steps[:3] == teacher.steps(history, other_target)[:3]
    assert all(step.startswith(marker) for marker, step in zip(STEP_MARKERS, steps, strict=True))
    trace = ReasoningTrace(steps, tuple(history), 0)
    assert quality_problem(trace, catalogue, target, history=history, target_text="<|a_1|>") is None


def test_titles_of_the_target_do_not_change_the_steps() -> None:
    renamed = replace(KINDS, titles=tuple("Other" for _ in KINDS.titles))
    assert MetadataTeacher(KINDS).steps([0, 1, 3], 7) == MetadataTeacher(renamed).steps([0, 1, 3], 7)


def test_bad_input_is_refused() -> None:
    teacher = MetadataTeacher(KINDS)
    with pytest.raises(ValueError, match="at least one item"):
        teacher.steps([], 0)
    with pytest.raises(ValueError, match="item 8 is not a row of the 8 items"):
        teacher.steps([0], 8)
    with pytest.raises(ValueError, match="item -1"):
        teacher.steps([-1], 0)


HISTORY = (1, 0, 3)
GOOD = ReasoningTrace(
    ("Evidence: mostly drama 3, heat 1.", "Preference: steady drama.", "Intent: drama.", "Recommendation: drama."),
    (1, 3),
    1,
)
TARGET_TEXT = "<|a_1|><|b_12|>"


def problem_of(trace: ReasoningTrace, catalogue: Catalogue = KINDS, target: int = 0, **settings: int) -> str | None:
    return quality_problem(trace, catalogue, target, history=HISTORY, target_text=TARGET_TEXT, **settings)


def with_step(place: int, step: str, trace: ReasoningTrace = GOOD) -> ReasoningTrace:
    steps = [*trace.steps[:place], step, *trace.steps[place + 1 :]]
    return replace(trace, steps=(steps[0], steps[1], steps[2], steps[3]))


def problem_with(*, title: str = "Nothing Of The Kind", place: int = 0, step: str | None = None) -> str | None:
    catalogue = catalogue_of([("Drama",), ("War",)], titles=[title, "Another"], brands=["Metallica", ""])
    return problem_of(with_step(place, GOOD.steps[place] if step is None else step), catalogue)


def test_gate_accepts_and_names_missing_steps() -> None:
    assert problem_with() is None
    assert problem_with(place=1, step="A steady taste.") == "step marker 'Preference:' is missing"
    assert problem_with(place=1, step="") == "step marker 'Preference:' is missing"
    assert problem_with(place=2, step="Intent: ") == "the step 'Intent:' is empty"
    assert problem_with(place=0, step="Evidence: a. Intent: b.") == "step marker 'Intent:' occurs more than once"
    swapped = replace(GOOD, steps=(GOOD.steps[1], GOOD.steps[0], *GOOD.steps[2:]))
    assert problem_of(swapped) == "step marker 'Evidence:' is out of order"


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


@pytest.mark.parametrize(
    "text",
    [
        "<|a_3|>", "<|a_1|>", "<|im_start|>", "<think>", "</think>", "<answer>", "</answer>", "<s>", "</s>", "<bos>",
        "<pad>", "<start_of_turn>", "[INST]", "[/INST]", "[PAD]", "<｜end▁of▁sentence｜>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", range(4))
def test_gate_rejects_special_tokens_wherever_they_stand(text: str, place: int) -> None:
    assert problem_of(with_step(place, f"{GOOD.steps[place]} so{text}it is.")) == "a step holds a special token"


@pytest.mark.parametrize("text", ["3 < 4 and 5 > 2", "<3", "a [REC] or [1]", "x < y, y> z", "||", "a <| b"])
def test_gate_lets_other_signs_through(text: str) -> None:
    assert problem_of(with_step(1, f"Preference: {text}")) is None


@pytest.mark.parametrize("place", range(4))
def test_gate_rejects_the_targets_semantic_id(place: int) -> None:
    trace = with_step(place, f"{GOOD.steps[place]} It is {TARGET_TEXT}.")
    assert problem_of(trace) == "a step names the target by its semantic ID"


def test_gate_rejects_steps_over_the_limit_to_the_character() -> None:
    length = len(" ".join(GOOD.steps))
    assert problem_of(GOOD, maximum_characters=length) is None
    assert problem_of(GOOD, maximum_characters=length - 1) == "the steps are over the character limit"
    assert problem_of(with_step(2, f"Intent: {'drama ' * 1000}")) == "the steps are over the character limit"


@pytest.mark.parametrize(
    ("rewritten", "problem"),
    [
        ((), "the rewriting is empty"),
        ((1, 2), "the rewriting holds an item that is not in the history"),
        ((1, 1), "the rewriting repeats an item"),
        ((0, 1), "the rewriting has another order than the history"),
        ((3, 0, 1), "the rewriting has another order than the history"),
        ((1,), None),
        ((3,), None),
        ((1, 0, 3), None),
    ],
)
def test_gate_checks_the_rewriting_against_the_history(rewritten: tuple[int, ...], problem: str | None) -> None:
    assert problem_of(replace(GOOD, rewritten=rewritten)) == problem


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 6), max_size=6))
def test_gate_passes_exactly_the_subsequences_of_the_history(history: list[int], rewritten: list[int]) -> None:
    subsets = [[place for place in range(len(history)) if number >> place & 1] for number in range(2 ** len(history))]
    subsequences = {tuple(history[place] for place in subset) for subset in subsets if subset}
    trace = replace(GOOD, rewritten=tuple(rewritten))
    problem = quality_problem(trace, KINDS, 0, history=history, target_text=TARGET_TEXT)
    assert (problem is None) == (tuple(rewritten) in subsequences)


def test_the_order_of_the_gate_is_fixed() -> None:
    """A trace with every fault, mended one by one in the order of the reasons."""
    named = replace(KINDS, titles=("The Long Night", *KINDS.titles[1:]))
    trace = replace(with_step(3, f"Recommend {TARGET_TEXT} </s> the long night {'x' * 99}."), rewritten=())
    found = [problem_of(trace, named, maximum_characters=160)]
    for step in (
        f"Recommendation: {TARGET_TEXT} </s> the long night {'x' * 99}.",
        f"Recommendation: {TARGET_TEXT} </s> the long night.",
        "Recommendation: </s> the long night.",
        "Recommendation: the long night.",
        "Recommendation: drama.",
    ):
        trace = with_step(3, step, trace)
        found.append(problem_of(trace, named, maximum_characters=160))
    assert found == [
        "step marker 'Recommendation:' is missing",
        "the steps are over the character limit",
        "a step names the target by its semantic ID",
        "a step holds a special token",
        "the target's title is named",
        "the rewriting is empty",
    ]


def test_every_word_of_the_sentences_is_known_to_the_gate() -> None:
    written = [MetadataTeacher(KINDS).steps(history, 1) for history in ([5], [0, 0, 1, 2, 4, 3, 6, 3], [0, 1])]
    kinds = {name.lower() for categories in KINDS.categories for name in categories}
    words = {word for steps in written for word in re.findall(r"[a-z'-]+", " ".join(steps).lower())} - kinds
    for word in words:
        titled = replace(KINDS, titles=(word,) * len(KINDS))
        assert all(problem_of(ReasoningTrace(steps, (1,), 2), titled, 1) is None for steps in written), word


def test_reasoning_needs_neither_torch_nor_ray() -> None:
    code = "import sys, curriculum.reasoning; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
