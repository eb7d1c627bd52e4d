"""A reward for answers that go with the history: what the users of its items had too, whatever came next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from item_index.neighbours import ItemKNearestNeighbours
from rewards.composition import RewardSample


class CollaborativeReward:
    """The discounted gain of the answer's place in item-kNN's ranking: 1 / log2(1 + place).

    Ranked are all items that the prompt does not show; of the user's earlier ones it knows nothing.

    A hit is a rare event: of the answers to a prompt one in fifty may be the true item, and a group without a hit says
    little of which answers were good ones. This reward says it of every answer. With a penalty to the reference policy
    of coefficient b, the policy that maximises it is the reference's times exp(reward / b): the product of the language
    model and its neighbours.

    The place and not the score pays: an answer's score is most often near the best one, so that the users' differences
    drown in what all of them have in common. Ill-formed responses, items of the history, and items that no item of the
    history votes for get 0.

    Args:
        neighbours: fitted on train interactions alone.
        item_ids: of the catalogue, by row.
    """

    def __init__(self, neighbours: ItemKNearestNeighbours, item_ids: Sequence[str | int]) -> None:
        self.neighbours = neighbours
        self.row_of_item = {item_id: row for row, item_id in enumerate(item_ids)}
        self._history: tuple[str | int, ...] | None = None
        self._gains_I = np.zeros(len(item_ids), np.float32)

    def __call__(self, sample: RewardSample) -> float:
        if not sample.well_formed or sample.answered_item is None:
            return 0.0
        if sample.history != self._history:  # the responses of a group come one after the other
            self._history, self._gains_I = sample.history, self.gains(sample.history)
        return float(self._gains_I[self.row_of_item[sample.answered_item]])

    def gains(self, history: Sequence[str | int]) -> np.ndarray:
        """float32 [items]: the reward of every item after a history, the oldest item first. Of equal scores the lower
        row comes first."""
        rows = np.array([self.row_of_item[item_id] for item_id in history], np.int64)
        scores_I = self.neighbours.scores([rows])[0]
        scores_I[rows] = 0.0
        voted = np.flatnonzero(scores_I)
        gains_I = np.zeros(len(scores_I), np.float32)
        gains_I[voted[np.argsort(-scores_I[voted], kind="stable")]] = 1 / np.log2(2 + np.arange(len(voted)))
        return gains_I
