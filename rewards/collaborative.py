"""A reward for answers that go with the history: what the users of its items had too, whatever came next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from item_index.neighbours import ItemKNearestNeighbours
from rewards.composition import RewardSample


class CollaborativeReward:
    """The discounted gain of the answer's place in item-kNN's ranking, 1 / log2(1 + place), over its usual gain.

    Ranked are all items that the prompt does not show; of the user's earlier ones it knows nothing.

    A hit is a rare event: of the answers to a prompt one in fifty may be the true item, and a group without a hit says
    little of which answers were good ones. This reward says it of every answer. With a penalty to the reference policy
    of coefficient b, the policy that maximises it is the reference's times exp(reward / b): the product of the language
    model and its neighbours.

    The place and not the score pays: an answer's score is most often near the best one, so that the users' differences
    drown in what all of them have in common. For the same reason an item's gain is divided by what it usually gains:
    what remains says how well it goes with this history rather than another, and a policy cannot raise the reward by
    recommending the same popular items to everybody. An item's usual gain is the mean of its gains g over some
    histories, each weighted by the gain itself, sum g^2 / sum g, so that users whom it does not concern do not count.
    Ill-formed responses, items of the history, and items that no item of the history votes for get 0.

    Args:
        neighbours: fitted on train interactions alone.
        item_ids: of the catalogue, by row.
        usual_histories: item rows of the histories that tell an item's usual gain; without any, no gain is divided.
    """

    def __init__(
        self, neighbours: ItemKNearestNeighbours, item_ids: Sequence[str | int],
        usual_histories: Sequence[np.ndarray] = (),
    ) -> None:  # fmt: skip
        self.neighbours = neighbours
        self.row_of_item = {item_id: row for row, item_id in enumerate(item_ids)}
        self.usual_gains_I = self._usual_gains(usual_histories)
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
        return self._discounted_gains(rows) / self.usual_gains_I

    def _discounted_gains(self, history: np.ndarray) -> np.ndarray:
        """float32 [items]: 1 / log2(1 + place) of every item that an item of the history votes for, else 0."""
        scores_I = self.neighbours.scores([history])[0]
        scores_I[history] = 0.0
        voted = np.flatnonzero(scores_I)
        gains_I = np.zeros(len(scores_I), np.float32)
        gains_I[voted[np.argsort(-scores_I[voted], kind="stable")]] = 1 / np.log2(2 + np.arange(len(voted)))
        return gains_I

    def _usual_gains(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [items]: each item's gain over the histories, weighted by itself; 1 for an item without any."""
        sums_I, squares_I = np.zeros((2, len(self.row_of_item)))
        for history in histories:
            gains_I = self._discounted_gains(history)
            sums_I += gains_I
            squares_I += gains_I**2
        return np.divide(squares_I, sums_I, out=np.ones_like(sums_I), where=sums_I > 0).astype(np.float32)
