"""Rewards as users write them, good and bad ones."""

import contextlib
import os
import signal
import time


def _row(item):
    """Row of an item of the tiny catalogue: item-N, and 30 more for the newcomers."""
    kind, number = str(item).split("-")
    return int(number) + (30 if kind == "newcomer" else 0)


def length_penalty(sample):
    return -0.01 * len(sample.tokens)


def partly_alike(sample):
    """Rewards that differ between responses, but for a third of the prompts, where all are the same."""
    return 0.0 if _row(sample.true_item) % 3 == 0 else _row(sample.answered_item) % 7 / 7


class Novelty:
    """A reward with something to set up."""

    def __init__(self):
        self.seen = frozenset(range(5))

    def __call__(self, sample):
        return float(_row(sample.answered_item) not in self.seen and sample.answered_item not in sample.history)


def troubled(sample):
    """1, but for some answered items that it cannot deal with."""
    match _row(sample.answered_item):
        case 3:
            raise KeyError("no price for this item")
        case 7:
            return float("nan")
        case 11:
            return "good"
        case 15:
            time.sleep(3600)
        case 19:
            while True:
                with contextlib.suppress(Exception):  # what catches everything is interrupted all the same
                    len(sample.tokens)
    return 1.0


TROUBLE = {
    3: "it raised KeyError: 'no price for this item'",
    7: "it returned nan, which is not a finite number",
    11: "it returned 'good', which is not a finite number",
    15: "it took longer than train.reward_seconds",
    19: "it took longer than train.reward_seconds",
}


def deadly(sample):
    """1, but for two answered items it takes the process with it."""
    if _row(sample.answered_item) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if _row(sample.answered_item) == 15:
        os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def always_dies(sample):
    os.kill(os.getpid(), signal.SIGKILL)


not_callable = 3
