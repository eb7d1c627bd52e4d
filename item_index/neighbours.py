"""Item-kNN: which items the users of an item have too, by cosine; a baseline, and the ground of a reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from scipy import sparse

from item_index.ragged import RaggedArray

LAST_ITEMS = 20


@dataclass
class ItemKNearestNeighbours:
    """Scores an item by its similarity to the last 20 items of the history, each step back weighted by `decay` more.

    The similarity of i and j is n_ij / (sqrt(n_i n_j) + shrink) over users who have them (n_ij: both), the cosine of
    their columns for shrink 0. Each item of the history votes for its `neighbours` most similar items, of equal ones
    those with the lower row. An empty history scores 0 everywhere.

    With a `popularity_discount` a the vote of i for j is divided by n_j^a: popular items score lower, which makes the
    cosine asymmetric (Aiolli, RecSys 2013).
    """

    neighbours: int = 1000
    shrink: float = 0.0
    decay: float = 0.6
    popularity_discount: float = 0.0
    similarity_II: sparse.csr_array = field(init=False, repr=False)

    def fit(self, train: list[np.ndarray], items: int) -> Self:
        """Count over the users' items in time order; `items` is the size of the catalogue. Returns the object."""
        rows = rows_of_catalogue(train, items)
        users_UI = sparse.csr_array(
            (np.ones(len(rows.values), dtype=np.float64), rows.values, rows.offsets), shape=(len(rows), items)
        )
        users_UI.sum_duplicates()
        users_UI.data[:] = 1.0  # a user has an item or not
        together_II = (users_UI.T @ users_UI).tocoo()
        counts_I = users_UI.sum(axis=0)
        item, other = together_II.coords
        similarity = together_II.data / (np.sqrt(counts_I[item] * counts_I[other]) + self.shrink)
        similarity /= counts_I[other] ** self.popularity_discount
        kept = item != other
        item, other, similarity = item[kept], other[kept], similarity[kept]
        order = np.lexsort((other, -similarity, item))
        item, other, similarity = item[order], other[order], similarity[order]
        rank = np.arange(len(item)) - np.searchsorted(item, item)  # among the neighbours of its item
        near = rank < self.neighbours
        self.similarity_II = sparse.csr_array(
            (similarity[near].astype(np.float32), (item[near], other[near])), shape=(items, items)
        )
        return self

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """float32 [users, items], higher is better; items of the history are scored like any other."""
        recent = [history[-LAST_ITEMS:] for history in histories]
        return (recency_weights(recent, self.similarity_II.shape[0], self.decay) @ self.similarity_II).toarray()


def recency_weights(histories: list[np.ndarray], items: int, decay: float) -> sparse.csr_array:
    """float32 [users, items]: decay ** (steps back from the last item), summed over an item's places."""
    rows = rows_of_catalogue(histories, items)
    steps_back = np.repeat(rows.offsets[1:], rows.lengths) - 1 - np.arange(len(rows.values))
    weights = (decay**steps_back).astype(np.float32)
    return sparse.csr_array((weights, rows.values, rows.offsets), shape=(len(rows), items))


def rows_of_catalogue(rows: list[np.ndarray], items: int) -> RaggedArray:
    """The users' items as one int64 array. Raises ValueError for an item that is no row of the catalogue."""
    ragged = RaggedArray.of(rows, np.int64)
    wrong = (ragged.values < 0) | (ragged.values >= items)
    if wrong.any():
        place = int(np.argmax(wrong))
        user = int(np.searchsorted(ragged.offsets, place, side="right")) - 1
        raise ValueError(f"user {user}: item {ragged.values[place]} is not a row of the {items} items")
    return ragged
