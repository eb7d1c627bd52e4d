"""Which places in the users' sequences become the next prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

from item_index.constraint import MODES, Mode

RAREST = 1 / 8  # a prompt that teaches nothing comes into one of eight passes at least


class PromptSampler:
    """Passes over all positions, in a new random order each, with an order of its own for each mode.

    With the curriculum a position that gave m groups without variance in a row comes into a pass with the probability
    max(1/8, 1/2^m), which is drawn when the pass begins: prompts that are too easy or too hard are asked more rarely,
    but they are asked again, for the policy changes.

    Args:
        positions: int64, the places.
        seed: fixes all passes, given the same record.
    """

    def __init__(self, positions: np.ndarray, seed: int, *, curriculum: bool = False) -> None:
        if not len(positions):
            raise ValueError("there are no places to make prompts of")
        self.positions, self.curriculum = np.asarray(positions, np.int64), curriculum
        self.generators = {mode: np.random.default_rng([seed, 4, number]) for number, mode in enumerate(MODES)}
        self.passes: dict[str, np.ndarray] = {mode: np.zeros(0, np.int64) for mode in MODES}
        self.drawn = dict.fromkeys(MODES, 0)
        self.misses = {mode: np.zeros(len(self.positions), np.int64) for mode in MODES}
        self.row = {int(position): row for row, position in enumerate(self.positions)}

    def draw(self, count: int, mode: Mode) -> np.ndarray:
        """int64 [count]: the next positions of a mode."""
        chosen: list[np.ndarray] = [np.zeros(0, np.int64)]
        while count > 0:
            if self.drawn[mode] == len(self.passes[mode]):
                self.passes[mode], self.drawn[mode] = self._new_pass(mode), 0
            part = self.passes[mode][self.drawn[mode] : self.drawn[mode] + count]
            self.drawn[mode] += len(part)
            count -= len(part)
            chosen.append(part)
        return np.concatenate(chosen)

    def record(self, position: int, mode: Mode, varied: bool) -> None:
        """Take note of whether a position's group had variance."""
        row = self.row[position]
        self.misses[mode][row] = 0 if varied else self.misses[mode][row] + 1

    def state(self) -> dict[str, Any]:
        """All that is needed to go on with the same draws, as JSON."""
        return {
            mode: {
                "generator": self.generators[mode].bit_generator.state, "pass": self.passes[mode].tolist(),
                "drawn": self.drawn[mode], "misses": self.misses[mode].tolist(),
            }
            for mode in MODES
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a sampler over the same positions was when it gave its `state`."""
        for mode in MODES:
            self.generators[mode].bit_generator.state = state[mode]["generator"]
            self.passes[mode], self.drawn[mode] = np.array(state[mode]["pass"], np.int64), state[mode]["drawn"]
            self.misses[mode] = np.array(state[mode]["misses"], np.int64)

    def _new_pass(self, mode: Mode) -> np.ndarray:
        generator = self.generators[mode]
        while True:
            order = generator.permutation(len(self.positions))
            if self.curriculum:
                share = np.maximum(RAREST, 0.5 ** self.misses[mode][order])
                order = order[generator.random(len(order)) < share]
            if len(order):
                return self.positions[order]
