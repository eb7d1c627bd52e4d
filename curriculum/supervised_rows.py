"""All rows of one supervised pass in the curriculum's order, and the rows whose loss is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from curriculum.alignment import AlignmentData, NextItem, TaskShare, alignment_rows, row_counts
from curriculum.rows import ReasoningExample, Row, direct_windows, reasoning_row, response_row
from curriculum.schedule import reasoning_positions

REASONING = "reasoning"


def rows_of_pass(
    data: AlignmentData,
    reasoning: Sequence[ReasoningExample],
    tasks: Mapping[str, TaskShare],
    *,
    number: int,
    uniform: bool,
    dense: bool,
    seed: int,
) -> Iterator[tuple[str, Row]]:
    """(task, row) pairs of pass `number`: reasoning rows grow denser over it, or have the same density everywhere.

    Positions of the reasoning rows are computed in advance (section 2 of the paper); the alignment tasks lie between
    them, shuffled together. The same arguments give the same rows.

    Args:
        tasks: share of every alignment task in a pass, see `alignment_rows`.
        uniform: the density of reasoning rows does not grow; the curriculum's last pass is so.
        dense: windows whose history items are learnt as well stand in for the rows of `next_item`.
    """
    generator = np.random.default_rng([seed, 3, number])
    windows: list[Row] = []
    if dense:
        tasks = {name: share for name, share in tasks.items() if name != NextItem.name}
        windows = list(direct_windows(data.sequences, data.held_out, data.builder, generator=generator))
    aligned = sum(row_counts(data, tasks).values())
    is_window = generator.permutation(np.arange(len(windows) + aligned) < len(windows))
    order = iter(generator.permutation(len(windows)))
    aligning = alignment_rows(data, tasks, seed=seed, number=number)
    shuffled = iter(generator.permutation(len(reasoning)))
    rows = len(is_window) + len(reasoning)
    places = np.zeros(rows, dtype=bool)
    places[reasoning_positions(rows, len(reasoning), uniform=uniform)] = True
    others = iter(is_window)
    for is_reasoning in places:
        if is_reasoning:
            example = reasoning[next(shuffled)]
            yield REASONING, reasoning_row(example, data.held_out, data.builder, dense=dense)
        elif next(others):
            yield NextItem.name, windows[next(order)]
        else:
            yield next(aligning)


def evaluation_rows(data: AlignmentData, *, users: int, seed: int) -> Iterator[tuple[str, Row]]:
    """The validation item of some users, drawn by the seed, as the direct mode's response to the items before it."""
    chosen = np.random.default_rng([seed, 8]).permutation(len(data.sequences))[:users]
    for user in np.sort(chosen):
        items = data.sequences.sequence(int(user))[:-1]
        yield (
            NextItem.name,
            response_row(data.builder.prompt(items[:-1], "direct"), data.builder.direct_response(int(items[-1]))),
        )
