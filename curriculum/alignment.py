"""The alignment tasks of section 1.6 of the paper as supervised rows: between histories, items and their text.

Every task counts its examples, renders one of them as a row, and draws variant and template of the row anew each time.
The loss is on the response alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Protocol

import numpy as np

from curriculum.interactions import UserSequences
from curriculum.prompts import SYSTEM_PROMPTS, PromptBuilder
from curriculum.rows import Row, UserText, places_in_sequence, response_row, train_positions
from curriculum.templates import ALIGNMENT_SYSTEM_PROMPT, TEMPLATES
from item_index.catalogue import Catalogue
from item_index.text import clean_text

_STREAM = 7  # of the random generators that are derived from a run's seed


@dataclass(frozen=True, eq=False)
class AlignmentData:
    """What the tasks read.

    Attributes:
        catalogue: I items, those of the builder's index.
        sequences: items of all users; only the train part is read.
        held_out: bool [interactions], targets that no row teaches; they may stand in histories.
        builder: renders prompts and responses; its `history_items` is the length of histories.
        user_texts: preference and query at places of the sequences; "" where there is none. Those at places which are
            no train targets, or held out, are not used.
        maximum_text_tokens: a title, description, preference or query is cut to so many.
        next_item_templates: whether `next_item` draws among templates or uses the prompt of direct mode alone.

    Raises ValueError where these do not belong together.
    """

    catalogue: Catalogue
    sequences: UserSequences
    held_out: np.ndarray
    builder: PromptBuilder
    user_texts: Sequence[UserText] = ()
    maximum_text_tokens: int = 512
    next_item_templates: bool = False

    def __post_init__(self) -> None:
        interactions = len(self.sequences.items)
        if self.catalogue.item_ids != self.builder.index.item_ids:
            raise ValueError("the catalogue's items are not those of the index")
        if self.held_out.shape != (interactions,):
            raise ValueError(f"held_out has shape {self.held_out.shape}, but there are {interactions} interactions")
        if self.maximum_text_tokens < 1:
            raise ValueError(f"maximum_text_tokens must be at least 1, got {self.maximum_text_tokens}")
        for text in self.user_texts:
            if not 0 <= text.position < interactions:
                raise ValueError(f"a user text is at place {text.position} of {interactions} interactions")

    @cached_property
    def titles(self) -> list[str]:
        return [self._cut(title) for title in self.catalogue.titles]

    @cached_property
    def descriptions(self) -> list[str]:
        return [self._cut(description) for description in self.catalogue.descriptions]

    @cached_property
    def preferences(self) -> list[str]:
        return [self._cut(text.preference) for text in self.user_texts]

    @cached_property
    def queries(self) -> list[str]:
        return [self._cut(text.query) for text in self.user_texts]

    def _cut(self, text: str) -> str:
        """Clean text, "" only where there was nothing but markup."""
        return self.builder.cut_text(clean_text(text), self.maximum_text_tokens)

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [interactions]: how many items of the same user come before."""
        return places_in_sequence(self.sequences)

    @cached_property
    def targets(self) -> np.ndarray:
        """bool [interactions]: train items with a history, held-out ones left out."""
        return train_positions(self.sequences) & (self.places > 0) & ~self.held_out

    @cached_property
    def user_text_targets(self) -> np.ndarray:
        """bool [user texts]: whether the text belongs to one of the `targets`."""
        return self.targets[np.array([text.position for text in self.user_texts], dtype=np.int64)]

    @cached_property
    def available(self) -> dict[str, dict[str, np.ndarray]]:
        """Per task and variant: bool [examples of the task], whether all text that the variant needs is there."""
        return {task.name: task.available(self) for task in TASKS}

    def history(self, position: int) -> np.ndarray:
        """int64 [1 .. history_items]: the items before a place of the sequences, the latest ones."""
        return self.sequences.items[position - min(int(self.places[position]), self.builder.history_items) : position]

    def spelled_history(self, position: int) -> str:
        """The semantic IDs of the history, one after the other."""
        return "".join(self.builder.index.text(int(item)) for item in self.history(position))


class AlignmentTask:
    """One task: examples known by number, each with one or more variants."""

    name: str
    system_prompt = ALIGNMENT_SYSTEM_PROMPT

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        """Per variant: bool [examples], see `AlignmentData.available`."""
        raise NotImplementedError

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        """Text of the placeholders of every variant."""
        raise NotImplementedError

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        """Token ids of the answer, with the end of sequence."""
        raise NotImplementedError

    def templates(self, data: AlignmentData, variant: str) -> tuple[str, ...]:
        return TEMPLATES[self.name][variant]

    def places(self, data: AlignmentData) -> np.ndarray:
        """int64 [n], ascending: the examples of which at least one variant is available."""
        return np.nonzero(np.any(list(data.available[self.name].values()), axis=0))[0]

    def row(self, data: AlignmentData, place: int, generator: np.random.Generator) -> Row:
        """One example in a variant and a template drawn at random; learnt is the response."""
        variants = [variant for variant, there in data.available[self.name].items() if there[place]]
        variant = variants[generator.integers(len(variants))]
        templates = self.templates(data, variant)
        message = templates[generator.integers(len(templates))].format_map(self.asked(data, place))
        prompt = data.builder.message_prompt(self.system_prompt, message)
        return response_row(prompt, self.response(data, place, variant))


class NextItem(AlignmentTask):
    """History to next item. An example is a place of the sequences; the prompt is that of direct mode."""

    name = "next_item"
    system_prompt = SYSTEM_PROMPTS["direct"]

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        return {"history": data.targets}

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {"history": data.spelled_history(place)}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.direct_response(int(data.sequences.items[place]))

    def row(self, data: AlignmentData, place: int, generator: np.random.Generator) -> Row:
        if data.next_item_templates:
            return super().row(data, place, generator)
        # The first template alone, which is the prompt of direct mode: put together from token ids, many times faster.
        return response_row(data.builder.prompt(data.history(place), "direct"), self.response(data, place, "history"))


class NextTitle(AlignmentTask):
    """History to the title of the next item. An example is a place of the sequences."""

    name = "next_title"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        return {"history": data.targets & _present(data.titles)[data.sequences.items]}

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {"history": data.spelled_history(place)}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.text_response(data.titles[data.sequences.items[place]])


class NextDescription(AlignmentTask):
    """History to the description of the next item. An example is a place of the sequences."""

    name = "next_description"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        return {"history": data.targets & _present(data.descriptions)[data.sequences.items]}

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {"history": data.spelled_history(place)}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.text_response(data.descriptions[data.sequences.items[place]])


class TitlesToItem(AlignmentTask):
    """Titles of the history to next item. An example is a place of the sequences."""

    name = "titles_to_item"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        blank = ~_present(data.titles)[data.sequences.items]
        blank_before = np.concatenate([[0], np.cumsum(blank)])
        ends = np.arange(len(blank))
        starts = ends - np.minimum(data.places, data.builder.history_items)
        return {"titles": data.targets & (blank_before[ends] == blank_before[starts])}

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        titles = (data.titles[item] for item in data.history(place))
        return {"titles": "\n".join(f"{number}. {title}" for number, title in enumerate(titles, start=1))}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.direct_response(int(data.sequences.items[place]))


class ItemToIndex(AlignmentTask):
    """Title, description or both to the semantic ID. An example is an item of the catalogue."""

    name = "item_to_index"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        return _item_text_available(data)

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {"title": data.titles[place], "description": data.descriptions[place]}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.direct_response(place)


class IndexToItem(AlignmentTask):
    """Semantic ID to title, description or both, one a line. An example is an item of the catalogue."""

    name = "index_to_item"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        return _item_text_available(data)

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {"item": data.builder.index.text(place)}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        text = {"title": data.titles[place], "description": data.descriptions[place]}
        return data.builder.text_response("\n".join(text[part] for part in variant.split("+")))


class ItemSearch(AlignmentTask):
    """Preference, query or both, with or without the history, to the item. An example is a user text."""

    name = "item_search"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        preference = data.user_text_targets & _present(data.preferences)
        query = data.user_text_targets & _present(data.queries)
        texts = {"preference": preference, "query": query, "preference+query": preference & query}
        return {f"{history}{name}": there for history in ("", "history+") for name, there in texts.items()}

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {
            "history": data.spelled_history(data.user_texts[place].position),
            "preference": data.preferences[place],
            "query": data.queries[place],
        }

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.direct_response(int(data.sequences.items[data.user_texts[place].position]))


class PreferenceObtain(AlignmentTask):
    """History to preference in words. An example is a user text."""

    name = "preference_obtain"

    def available(self, data: AlignmentData) -> dict[str, np.ndarray]:
        return {"history": data.user_text_targets & _present(data.preferences)}

    def asked(self, data: AlignmentData, place: int) -> dict[str, str]:
        return {"history": data.spelled_history(data.user_texts[place].position)}

    def response(self, data: AlignmentData, place: int, variant: str) -> list[int]:
        return data.builder.text_response(data.preferences[place])


TASKS: tuple[AlignmentTask, ...] = (
    NextItem(), NextTitle(), NextDescription(), TitlesToItem(), ItemToIndex(), IndexToItem(), ItemSearch(),
    PreferenceObtain(),
)  # fmt: skip


def _present(texts: list[str]) -> np.ndarray:
    """bool [texts]: which are not empty."""
    return np.array([bool(text) for text in texts], dtype=bool)


def _item_text_available(data: AlignmentData) -> dict[str, np.ndarray]:
    title, description = _present(data.titles), _present(data.descriptions)
    return {"title": title, "description": description, "title+description": title & description}


class TaskShare(Protocol):
    """How much of a pass a task gets.

    Attributes:
        weight: rows per example, at least 0.
        cap: rows at most; None is no limit.
    """

    @property
    def weight(self) -> float: ...
    @property
    def cap(self) -> int | None: ...


def availability(data: AlignmentData) -> dict[str, dict[str, int]]:
    """Per task and variant: how many examples have all text that they need."""
    return {
        name: {variant: int(there.sum()) for variant, there in variants.items()}
        for name, variants in data.available.items()
    }


def row_counts(data: AlignmentData, tasks: Mapping[str, TaskShare]) -> dict[str, int]:
    """Rows of each named task in one pass: min(cap, round(weight x examples)).

    Raises ValueError for a name that is no task, and for a negative weight or cap.
    """
    if unknown := sorted(set(tasks) - {task.name for task in TASKS}):
        raise ValueError(f"there is no alignment task {unknown[0]!r}, only {', '.join(t.name for t in TASKS)}")
    counts = {}
    for task in TASKS:
        if task.name in tasks:
            weight, cap = tasks[task.name].weight, tasks[task.name].cap
            if weight < 0 or (cap is not None and cap < 0):
                raise ValueError(f"task {task.name!r} has weight {weight} and cap {cap}; neither may be negative")
            rows = round(weight * len(task.places(data)))
            counts[task.name] = rows if cap is None else min(cap, rows)
    return counts


def alignment_rows(
    data: AlignmentData, tasks: Mapping[str, TaskShare], *, seed: int, number: int
) -> Iterator[tuple[str, Row]]:
    """Task name and row, for every row of one pass, the tasks shuffled together; a row is built when it is taken.

    A task has as many rows as `row_counts` says: a sample of its examples where these are more, else all of them as
    often as they go in whole, and a sample. Samples, variants, templates and order are drawn for each `seed` and pass
    `number`; the rows of one task and their order among each other do not depend on the other tasks. Tasks that
    `tasks` does not name have no rows. Raises ValueError as `row_counts` does.
    """
    counts = row_counts(data, tasks)
    chosen = [task for task in TASKS if task.name in counts]
    generators = [np.random.default_rng([seed, _STREAM, number, TASKS.index(task)]) for task in chosen]
    remaining = [
        iter(_drawn(task.places(data), counts[task.name], generator))
        for task, generator in zip(chosen, generators, strict=True)
    ]
    turns = np.repeat(np.arange(len(chosen)), np.array([counts[task.name] for task in chosen], dtype=np.int64))
    turns = np.random.default_rng([seed, _STREAM, number, len(TASKS)]).permutation(turns)
    return ((chosen[turn].name, chosen[turn].row(data, int(next(remaining[turn])), generators[turn])) for turn in turns)


def _drawn(places: np.ndarray, rows: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [rows]: all places, each time in another order, until the rows are full."""
    rounds = -(-rows // max(len(places), 1))
    return np.concatenate([generator.permutation(places) for _ in range(rounds)] or [places])[:rows]


def alignment_texts(catalogue: Catalogue, user_texts: Sequence[UserText]) -> Iterator[str]:
    """All words that rows of these tasks can hold, clean and uncut: what a tokenizer of one's own has to learn."""
    yield ALIGNMENT_SYSTEM_PROMPT
    for variants in TEMPLATES.values():
        for template in (template for templates in variants.values() for template in templates):
            yield from (fixed for fixed, *_ in Formatter().parse(template) if fixed)
    for text in (*catalogue.titles, *catalogue.descriptions):
        yield clean_text(text)
    for user_text in user_texts:
        yield clean_text(user_text.preference)
        yield clean_text(user_text.query)
