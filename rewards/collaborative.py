"""A reward for answers that go with the history: what the users of its items had too, whatever came next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from item_index.neighbours import ItemKNearestNeighbours
from rewards.composition import RewardSample


class CollaborativeReward:
    """The item-kNN score of the answered item as a share of the best unseen item's, from 0 to 1.

    A hit is a rare event: of the answers to a prompt one in fifty may be the true item, and a group without a hit says
    little of which answers were good ones. This reward says it of every answer. With a penalty to the reference policy
    of coefficient b, the policy that maximises it is the reference's times exp(reward / b): the product of the language
    model and its neighbours. Ill-formed responses and items of the history get 0, and so does everything where no item
    of the history has a neighbour.

    Args:
        neighbours: fitted on train interactions alone.
        item_ids: of the catalogue, by row.
    """

    def __init__(self, neighbours: ItemKNearestNeighbours, item_ids: Sequence[str | int]) -> None:
        self.neighbours = neighbours
        self.row_of_item = {item_id: row for row, item_id in enumerate(item_ids)}
        self._history: tuple[str | int, ...] | None = None
        self._shares_I = np.zeros(len(item_ids), np.float32)

    def __call__(self, sample: RewardSample) -> float:
        if not sample.well_formed or sample.answered_item is None:
            return 0.0
        if sample.history != self._history:  # the responses of a group come one after the other
            self._history, self._shares_I = sample.history, self.shares(sample.history)
        return float(self._shares_I[self.row_of_item[sample.answered_item]])

    def shares(self, history: Sequence[str | int]) -> np.ndarray:
        """float32 [items]: the reward of every item after a history, the oldest item first."""
        rows = np.array([self.row_of_item[item_id] for item_id in history], np.int64)
        scores_I = self.neighbours.scores([rows])[0]
        scores_I[rows] = 0.0
        highest = scores_I.max()
        return scores_I / highest if highest > 0 else scores_I
