"""Counting baselines that a trained recommender has to beat, and the ranking of their scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import numpy as np
from scipy import sparse

from item_index.neighbours import recency_weights, rows_of_catalogue

BaselineName = Literal["popularity", "markov", "item_knn", "sasrec", "gru4rec"]
COUNTING_BASELINES: tuple[BaselineName, ...] = ("popularity", "markov", "item_knn")


class Baseline(Protocol):
    """What every baseline offers; items are rows of the catalogue."""

    def fit(self, train: list[np.ndarray], items: int) -> Self:
        """Count over the users' items in time order; `items` is the size of the catalogue. Returns the baseline."""

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """float32 [users, items], higher is better; items of the history are scored like any other."""


@dataclass
class Popularity:
    """Scores an item by its number of interactions, for everyone alike."""

    counts_I: np.ndarray = field(init=False, repr=False)

    def fit(self, train: list[np.ndarray], items: int) -> Self:
        rows = rows_of_catalogue(train, items)
        self.counts_I = np.bincount(rows.values, minlength=items).astype(np.float32)
        return self

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        return np.tile(self.counts_I, (len(histories), 1))


@dataclass
class MarkovChain:
    """Scores an item by how often it came among the next `window` items after the history's last one.

    An empty history scores 0 everywhere.
    """

    window: int = 3
    transitions_II: sparse.csr_array = field(init=False, repr=False)

    def fit(self, train: list[np.ndarray], items: int) -> Self:
        rows = rows_of_catalogue(train, items)
        user = np.repeat(np.arange(len(rows)), rows.lengths)
        earlier, later = [], []
        for step in range(1, self.window + 1):
            same_user = user[step:] == user[:-step]
            earlier.append(rows.values[:-step][same_user])
            later.append(rows.values[step:][same_user])
        places = (np.concatenate(earlier), np.concatenate(later))
        counts = np.ones(len(places[0]), dtype=np.float32)
        self.transitions_II = sparse.csr_array((counts, places), shape=(items, items))  # repeated places add up
        return self

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        last_UI = recency_weights([history[-1:] for history in histories], self.transitions_II.shape[0], decay=1.0)
        return (last_UI @ self.transitions_II).toarray()


def rank_unseen(scores_UI: np.ndarray, seen: list[np.ndarray], k: int) -> np.ndarray:
    """int64 [users, k]: the k best items of each user without those in `seen`, best first.

    Of equal scores the lower row comes first. -1 stands where a user has fewer than k unseen items; a score of minus
    infinity takes an item out as well. Raises ValueError for NaN, k below 1, and another number of users in `seen`.
    """
    scores_UI = np.asarray(scores_UI)
    if len(seen) != len(scores_UI):
        raise ValueError(f"scores of {len(scores_UI)} users, but seen items of {len(seen)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if np.isnan(scores_UI).any():
        raise ValueError(f"user {int(np.argmax(np.isnan(scores_UI).any(axis=1)))}: a score is not a number")
    items = scores_UI.shape[1]
    rows = rows_of_catalogue(seen, items)
    masked_UI = scores_UI.copy() if np.issubdtype(scores_UI.dtype, np.floating) else scores_UI.astype(np.float64)
    masked_UI[np.repeat(np.arange(len(rows)), rows.lengths), rows.values] = -np.inf
    best_UK = np.argsort(-masked_UI, axis=1, kind="stable")[:, :k]
    ranked_UK = np.full((len(scores_UI), k), -1, dtype=np.int64)
    out = np.take_along_axis(masked_UI, best_UK, axis=1) == -np.inf
    ranked_UK[:, : best_UK.shape[1]] = np.where(out, -1, best_UK)
    return ranked_UK
