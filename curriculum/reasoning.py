"""Reasoning traces: the embedded teacher, which argues from item metadata, and the gate that every trace has to pass.

A trace has the five steps of section 2 of the paper. Steps 1 to 4 go inside the think block, step 5 is the denoised
history behind it, which `curriculum.denoising` makes whoever the teacher is. The embedded teacher's vocabulary is small
and regular, because small models have to learn to write it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from item_index.catalogue import Catalogue
from item_index.text import clean_text
from rewards.answer import REWRITE_MARKER, STEP_MARKERS

Steps = tuple[str, str, str, str]
"""Steps 1 to 4, each beginning with its marker of `rewards.answer.STEP_MARKERS`."""

RECENT_ITEMS = 5
DESCRIBED_CATEGORIES = 3
MAXIMUM_THINK_CHARACTERS = 4000

# What tokenizers take for a token of its own wherever it stands in a text: codes, roles and ends of the <|..|> kind,
# tags such as <think>, </s> and <bos>, and the names that older tokenizers put into brackets.
_SPECIAL_TOKEN = re.compile(
    r"<[|｜][^<>]*[|｜]>|</?[A-Za-z][\w-]*>|\[/?(?:INST|PAD|UNK|BOS|EOS|CLS|SEP|MASK|TOOL_CALLS|TOOL_RESULTS)\]"
)

_PUNCTUATION = re.compile(r"[\s.,;:|]+")
_TRAILING_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")
# Words of the teacher's sentences: an item that is called "Taste" is not named by a trace that speaks of taste.
_SENTENCE_WORDS = (
    "an and by clear evidence fading for history in intent interest item items kind lately likely mostly next no"
    " of often or preference recommendation rewritten rising shifting stated steady taste the want"
)


@dataclass(frozen=True)
class ReasoningTrace:
    """One reasoning chain without its answer.

    Attributes:
        steps: steps 1 to 4, by a teacher.
        rewritten: step 5, the items (rows of the catalogue) of the history that are kept, in their order.
        removed: how many items of the history were not kept.
    """

    steps: Steps
    rewritten: tuple[int, ...]
    removed: int

    def render(self, semantic_id_text: Callable[[int], str]) -> tuple[str, str]:
        """Text of the think block (steps 1 to 4) and of the rewriting behind it (step 5)."""
        return " ".join(self.steps), f"{REWRITE_MARKER} {''.join(semantic_id_text(item) for item in self.rewritten)}"


class MetadataTeacher:
    """Writes steps from categories and brands alone; the same history and target always give the same steps.

    Steps 1 to 3 are functions of the history: they never see the target. Step 4 describes the target by at most three
    categories (the rarest of the catalogue, the most general of them first) and its brand, never by its title.

    Category names are written in lower case, free of markup, special tokens and punctuation between words. Categories
    that every item has are left out, because they tell nothing apart.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        words = [tuple(dict.fromkeys(filter(None, map(_words, names)))) for names in catalogue.categories]
        items_with = Counter(category for categories in words for category in categories)
        described_items = sum(bool(categories) for categories in words)
        self._frequency = {category: count for category, count in items_with.items() if count < described_items}
        self._categories = [tuple(name for name in categories if name in self._frequency) for categories in words]
        self._brands = [_words(brand) for brand in catalogue.brands]

    def steps(self, history: Sequence[int], target: int) -> Steps:
        """Steps 1 to 4 for a history (rows of the catalogue in time order, at least one) and the true next item.

        Counts are over the whole `history`, so pass the part of it that the model sees. Raises ValueError for an empty
        history and for rows outside the catalogue.
        """
        if len(history) == 0:
            raise ValueError("a trace needs a history of at least one item")
        items = [int(item) for item in history]
        for item in (*items, target):
            if not 0 <= item < len(self._categories):
                raise ValueError(f"item {item} is not a row of the {len(self._categories)} items")
        described = self._description(target)
        return (*self._steps_from_history(items), self._recommendation(described, self._brands[target]))

    def preference(self, history: Sequence[int]) -> str:
        """Step 2 as a sentence of its own: a function of the history, as `steps` takes it."""
        said = self._steps_from_history([int(item) for item in history])[1].removeprefix(STEP_MARKERS[1]).strip()
        return said[0].upper() + said[1:]

    def query(self, target: int) -> str:
        """Step 4 in the user's voice: the target's kind and brand, never its title."""
        said = self._recommendation(self._description(target), self._brands[target])
        return f"I want {said.removeprefix(STEP_MARKERS[3]).strip()}"

    def _steps_from_history(self, items: list[int]) -> tuple[str, str, str]:
        """Behavioural evidence, latent preference and intent."""
        recent_items = items[-RECENT_ITEMS:]
        whole = Counter(category for item in items for category in self._categories[item])
        recent = Counter(category for item in recent_items for category in self._categories[item])
        brands = Counter(self._brands[item] for item in items if self._brands[item])
        # Share among the recent items less share of the whole history, times both numbers of items: exact integers.
        trend = {category: recent[category] * len(items) - whole[category] * len(recent_items) for category in whole}
        fifth = len(items) * len(recent_items) / 5

        evidence = f"{STEP_MARKERS[0]} {len(items)} {'item' if len(items) == 1 else 'items'}, "
        evidence += f"mostly {_counted(whole, 3)}" if whole else "no stated kind"
        if recent and len(items) > RECENT_ITEMS:
            evidence += f"; lately {_counted(recent, 2)}"
        if brands and max(brands.values()) > 1:
            evidence += f"; often by {_counted(brands, 1)}"

        rising = [category for category in _ordered(trend) if trend[category] > fifth][:1]
        fading = [category for category in _ordered({c: -t for c, t in trend.items()}) if trend[category] < -fifth][:1]
        preference = " and ".join(_ordered(whole)[:2])
        if not whole:
            preference = "no clear taste"
        elif rising or fading:
            preference = f"shifting taste for {preference}"
            preference += "".join(f", rising interest in {category}" for category in rising)
            preference += "".join(f", fading interest in {category}" for category in fading)
        else:
            preference = f"steady taste for {preference}"

        # The sum of both shares, again as integers: what is lately there counts, and so does what was always there.
        weight = {category: trend[category] + 2 * whole[category] * len(recent_items) for category in whole}
        intent = " or ".join(_ordered(weight)[:2]) or "of no clear kind"
        return (
            f"{evidence}.",
            f"{STEP_MARKERS[1]} {preference}.",
            f"{STEP_MARKERS[2]} the next item is likely {intent}.",
        )

    def _description(self, target: int) -> list[str]:
        """The target's most specific categories, from general to specific."""
        frequency = self._frequency
        rarest = sorted(self._categories[target], key=lambda category: (frequency[category], category))
        return _ordered({category: frequency[category] for category in rarest[:DESCRIBED_CATEGORIES]})

    @staticmethod
    def _recommendation(described: list[str], brand: str) -> str:
        kind = f"an item of {' and '.join(described)}" if described else "an item of no stated kind"
        return f"{STEP_MARKERS[3]} {kind}{f' by {brand}' if brand else ''}."


def quality_problem(
    trace: ReasoningTrace,
    catalogue: Catalogue,
    target: int,
    *,
    history: Sequence[int],
    target_text: str,
    maximum_characters: int = MAXIMUM_THINK_CHARACTERS,
) -> str | None:
    """Why a trace, by whatever teacher, is to be rejected; None where it is not.

    The first of these that holds, in this order. The reasons name no item, so that they can be counted:

    1. "step marker '..' is missing" or ".. is out of order" or "the step '..' is empty", step by step; then
       "step marker '..' occurs more than once".
    2. "the steps are over the character limit": joined by blanks, more than `maximum_characters`.
    3. "a step names the target by its semantic ID", "a step holds a special token". Within a row such text turns into
       tokens that have a meaning of their own, those of structure among them.
    4. "the target's title is named": verbatim, in any case, without a trailing year in parentheses, as whole words.
       Titles that cannot be told from ordinary speech are not looked for: fewer than 3 characters, a number, a category
       or brand of the catalogue, or one word of the embedded teacher's own sentences.
    5. "the rewriting is empty", "the rewriting holds an item that is not in the history", "the rewriting repeats an
       item", "the rewriting has another order than the history".

    Args:
        history: rows of the catalogue that the trace was written for, in time order.
        target_text: the target's semantic ID as its tokens are written.
        maximum_characters: of steps 1 to 4 together.
    """
    text = " ".join(trace.steps)
    problem = _marker_problem(trace.steps)
    if problem is not None:
        return problem
    if len(text) > maximum_characters:
        return "the steps are over the character limit"
    if target_text in text:
        return "a step names the target by its semantic ID"
    if _SPECIAL_TOKEN.search(text):
        return "a step holds a special token"
    if _names_title(text, catalogue, target):
        return "the target's title is named"
    return _rewriting_problem(trace.rewritten, history)


def user_text_problem(text: str, catalogue: Catalogue, target: int) -> str | None:
    """Why a preference or query, by whatever teacher, is to be rejected; None where it is not.

    "a user text holds a special token", which semantic IDs are made of, or "a user text names the target's title", as
    `quality_problem` looks for it in the steps.
    """
    if _SPECIAL_TOKEN.search(text):
        return "a user text holds a special token"
    return "a user text names the target's title" if _names_title(text, catalogue, target) else None


def _marker_problem(steps: Steps) -> str | None:
    for marker, step in zip(STEP_MARKERS, steps, strict=True):
        if not step.startswith(marker):
            known = any(other.startswith(marker) for other in steps)
            return f"step marker '{marker}' is {'out of order' if known else 'missing'}"
        if not step.removeprefix(marker).strip(" ."):
            return f"the step '{marker}' is empty"
    for marker in STEP_MARKERS:
        if " ".join(steps).count(marker) > 1:
            return f"step marker '{marker}' occurs more than once"
    return None


def _names_title(text: str, catalogue: Catalogue, target: int) -> bool:
    title = _TRAILING_YEAR.sub("", clean_text(catalogue.titles[target])).casefold()
    if len(title) < 3 or title.isdigit() or title in _SENTENCE_WORDS.split():
        return False
    if not re.search(rf"(?<!\w){re.escape(title)}(?!\w)", clean_text(text).casefold()):
        return False
    # Looked up after the match, which is rare, because it goes through the whole catalogue.
    name = _words(title)
    if any(name == _words(brand) for brand in catalogue.brands):
        return False
    return not any(name == _words(category) for categories in catalogue.categories for category in categories)


def _rewriting_problem(rewritten: Sequence[int], history: Sequence[int]) -> str | None:
    if not rewritten:
        return "the rewriting is empty"
    had = Counter(history)
    if any(item not in had for item in rewritten):
        return "the rewriting holds an item that is not in the history"
    if Counter(rewritten) - had:
        return "the rewriting repeats an item"
    remaining = iter(history)
    if not all(item in remaining for item in rewritten):
        return "the rewriting has another order than the history"
    return None


def _words(name: str) -> str:
    """A category or brand as it is written in a trace."""
    return _PUNCTUATION.sub(" ", clean_text(name)).strip().lower()


def _ordered(numbers: dict[str, int] | Counter[str]) -> list[str]:
    """Names by falling number, equal ones by name."""
    return sorted(numbers, key=lambda name: (-numbers[name], name))


def _counted(counts: Counter[str], most: int) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in _ordered(counts)[:most])
