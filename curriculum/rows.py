"""Supervised rows: dense next-item windows for the direct mode, and reasoning rows from traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from item_index.constraint import Mode

Row = tuple[np.ndarray, np.ndarray]
"""Token ids int32 [n], and bool [n]: which of them are learnt."""


def train_positions(sequences: UserSequences) -> np.ndarray:
    """bool [interactions]: whether the place in `sequences.items` belongs to the train part."""
    positions = np.ones(len(sequences.items), dtype=bool)
    ends = sequences.offsets_U1[1:]
    positions[ends - 1] = False
    positions[ends - 2] = False
    return positions


def places_in_sequence(sequences: UserSequences) -> np.ndarray:
    """int64 [interactions]: how many items of the same user come before."""
    starts = sequences.offsets_U1[:-1]
    return np.arange(len(sequences.items)) - np.repeat(starts, np.diff(sequences.offsets_U1))


def held_out_targets(sequences: UserSequences, *, share: float, minimum_history: int, seed: int) -> np.ndarray:
    """bool [interactions]: train targets kept out of the supervised loss for RL, a `share` of the eligible ones.

    They stay in the histories of later items.
    """
    eligible = np.nonzero(train_positions(sequences) & (places_in_sequence(sequences) >= minimum_history))[0]
    held_out = np.zeros(len(sequences.items), dtype=bool)
    chosen = np.random.default_rng([seed, 1]).permutation(eligible)[: round(share * len(eligible))]
    held_out[chosen] = True
    return held_out


def direct_windows(
    sequences: UserSequences, held_out: np.ndarray, builder: PromptBuilder, *, generator: np.random.Generator
) -> Iterator[Row]:
    """Each user's train items cut into windows of a full history and its target, from a random first cut.

    Supervision is dense: in a window every item but the first is learnt, each the next one of those before it, so a
    pass costs about one token per token of the data. Held-out targets are never learnt.
    """
    width = builder.history_items + 1
    for user in range(len(sequences)):
        start = int(sequences.offsets_U1[user])
        train = sequences.train(user)
        cuts = np.arange(int(generator.integers(1, width + 1)), len(train), width)
        for begin, end in zip(np.concatenate([[0], cuts]), np.concatenate([cuts, [len(train)]]), strict=True):
            if end - begin >= 2:
                yield direct_row(train[begin:end], held_out[start + begin : start + end], builder)


def direct_row(items: np.ndarray, skipped: np.ndarray, builder: PromptBuilder) -> Row:
    """The last item as response to the others; learnt: every item but the first and the skipped ones."""
    row = _with_dense_history(items[:-1], skipped[:-1], "direct", builder.direct_response(int(items[-1])), builder)
    if skipped[-1]:
        row[1][-(len(builder.item_tokens[int(items[-1])]) + 1) :] = False
    return row


def response_row(prompt: Sequence[int], response: Sequence[int]) -> Row:
    """A prompt with its response, which alone is learnt."""
    learnt = np.zeros(len(prompt) + len(response), dtype=bool)
    learnt[len(prompt) :] = True
    return np.array([*prompt, *response], dtype=np.int32), learnt


def _with_dense_history(
    history: np.ndarray, skipped: np.ndarray, mode: Mode, response: list[int], builder: PromptBuilder
) -> Row:
    """A prompt with its response; learnt: the response, and every item of the history but the first and the skipped."""
    prompt = builder.prompt(history, mode)
    learnt = np.zeros(len(prompt) + len(response), dtype=bool)
    place = builder.history_start(mode)
    for number, item in enumerate(history):
        length = len(builder.item_tokens[int(item)])
        learnt[place : place + length] = number > 0 and not skipped[number]
        place += length
    learnt[len(prompt) :] = True
    return np.array([*prompt, *response], dtype=np.int32), learnt


@dataclass(frozen=True)
class UserText:
    """What a user wants at one place of the sequences, in words; `position` is the target's place in the flat items.

    Attributes:
        preference: what the history says about the user; written without sight of the target.
        query: what kind of item is sought, in the user's voice; never the target's title.
    """

    position: int
    preference: str
    query: str


@dataclass(frozen=True)
class ReasoningExample:
    """A train target with its trace as text; `position` is the target's place in the sequences' flat items.

    `source` says who wrote the think block: "metadata", "endpoint" or "engine".
    """

    position: int
    history: tuple[int, ...]
    target: int
    think: str
    rewriting: str
    source: str = "metadata"


def reasoning_row(example: ReasoningExample, held_out: np.ndarray, builder: PromptBuilder, *, dense: bool) -> Row:
    """Chain, rewritten history and answer as response to the history, which is learnt as well where `dense`."""
    response = builder.reasoning_response(example.think, example.rewriting, example.target)
    history = np.array(example.history)
    if not dense:
        return response_row(builder.prompt(history, "reasoning"), response)
    skipped = held_out[example.position - len(example.history) : example.position]
    return _with_dense_history(history, skipped, "reasoning", response, builder)
