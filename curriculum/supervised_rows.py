"""All rows of one supervised pass in the curriculum's order, and the rows whose loss is measured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from curriculum.corpus import Corpus
from curriculum.rows import Row, direct_windows, evaluation_row, next_item_rows, reasoning_row
from curriculum.schedule import reasoning_positions

REASONING, NEXT_ITEM = "reasoning", "next_item"


def rows_of_pass(corpus: Corpus, *, number: int, passes: int, dense: bool, seed: int) -> Iterator[tuple[str, Row]]:
    """(task, row) pairs of pass `number`: reasoning rows grow denser over a pass, and are uniform in the last one.

    The same arguments give the same rows. Section 2 of the paper, positions computed in advance.
    """
    generator = np.random.default_rng([seed, 3, number])
    if dense:
        direct = list(direct_windows(corpus.sequences, corpus.held_out, corpus.builder, generator=generator))
    else:
        direct = list(next_item_rows(corpus.sequences, corpus.held_out, corpus.builder))
    order = generator.permutation(len(direct))
    shuffled = generator.permutation(len(corpus.reasoning))
    rows = len(order) + len(shuffled)
    places = set(reasoning_positions(rows, len(shuffled), uniform=number == passes - 1).tolist())
    others, reasoning = iter(order), iter(shuffled)
    for place in range(rows):
        if place in places:
            yield (
                REASONING,
                reasoning_row(corpus.reasoning[next(reasoning)], corpus.held_out, corpus.builder, dense=dense),
            )
        else:
            yield NEXT_ITEM, direct[next(others)]


def evaluation_rows(corpus: Corpus, *, users: int, seed: int) -> Iterator[tuple[str, Row]]:
    """The validation item of some users, drawn by the seed, as the direct mode's response to the items before it."""
    chosen = np.random.default_rng([seed, 8]).permutation(len(corpus.sequences))[:users]
    for user in np.sort(chosen):
        yield NEXT_ITEM, evaluation_row(corpus.sequences.sequence(int(user))[:-1], corpus.builder)
