"""Denoised histories: which items carry evidence for the target, by item vectors and train interactions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import sparse

from item_index.ragged import RaggedArray

BLOCK_PAIRS = 65_536  # (history item, target) pairs whose vectors are in memory at once
BLOCK_TARGETS = 256  # targets whose co-occurrence counts are in memory at once


class Denoiser:
    """Removes from a history the items that carry least evidence for the target; never adds, repeats or reorders any.

    The evidence of a history item h for the target t of user u has two parts:

    - the cosine of the item vectors of h and t, to six decimals (0 where a vector is zero);
    - the co-interaction cosine c(h, t) / sqrt(n(h) n(t)), where n counts the train users of an item and c those of both
      items, in each count *without u*: else every history would be evidence for its own target.

    The cosine of counts, and not pointwise mutual information, because the latter puts items that one single user had
    above all others; and not the bare count, which would be popularity.

    The parts have no common scale, so each is replaced by its rank within the history (equal values share their mean
    rank), and the evidence is the mean of both ranks. Where it ties, the later item counts for more. Of L items
    round(removed_share L) with the least evidence are removed (halves up), more where over `maximum_items` would be
    left, and at least one item stays. GREAM leaves the criterion open.

    Vectors may hold a collaborative block; u's own interactions had their small part in it, and that is not undone.

    Args:
        item_vectors_ID: float32 [items, D], the vectors of the index in the catalogue's order.
        train_matrix: [users, items], 1 where the user's train part holds the item, with no other part of the data.
        removed_share: share of a history to remove, 0 <= share < 1.
        maximum_items: kept items at most, None for no bound.

    Raises ValueError for vectors and matrix of unequal numbers of items, and settings out of range.
    """

    def __init__(
        self,
        item_vectors_ID: np.ndarray,
        train_matrix: sparse.csr_array,
        *,
        removed_share: float,
        maximum_items: int | None = None,
    ) -> None:
        if item_vectors_ID.ndim != 2 or len(item_vectors_ID) != train_matrix.shape[1]:
            raise ValueError(f"vectors of shape {item_vectors_ID.shape} for {train_matrix.shape[1]} items")
        if not 0 <= removed_share < 1:
            raise ValueError(f"removed_share must be in [0, 1), got {removed_share}")
        if maximum_items is not None and maximum_items < 1:
            raise ValueError(f"maximum_items must be at least 1, got {maximum_items}")
        self.vectors_ID = item_vectors_ID
        self.norms_I = np.sqrt(np.einsum("id,id->i", item_vectors_ID, item_vectors_ID, dtype=np.float64))
        self.train_UI = sparse.csr_array(train_matrix, dtype=np.int32).sorted_indices()
        self.train_IU = sparse.csr_array(self.train_UI.T)
        self.users_I = np.diff(self.train_IU.indptr)
        self.removed_share = removed_share
        self.maximum_items = maximum_items

    def keep(self, history: Sequence[int], target: int, *, user: int) -> tuple[int, ...]:
        """The kept items of one history (rows of the catalogue in time order) for the target of `user` (row of the
        train matrix), in their order. Raises like `keep_many`."""
        kept = self.keep_many(RaggedArray.of([history], np.int64), np.array([target]), np.array([user]))
        return tuple(kept[0].tolist())

    def keep_many(self, histories: RaggedArray, targets_E: np.ndarray, users_E: np.ndarray) -> RaggedArray:
        """The kept items of E histories, each for its own target and user, in their order; `keep` for many at once.

        Raises ValueError for an empty history, and for items or users that have no row.
        """
        if not len(histories) == len(targets_E) == len(users_E):
            raise ValueError(f"{len(histories)} histories, {len(targets_E)} targets and {len(users_E)} users")
        if not len(histories):
            return histories
        lengths_E = histories.lengths
        if (lengths_E == 0).any():
            raise ValueError(f"history {int(np.argmin(lengths_E))} is empty; a rewriting keeps at least one item")
        users, items = self.train_UI.shape
        given = (("item", histories.values, items), ("target", targets_E, items), ("user", users_E, users))
        for name, rows, end in given:
            if rows.min() < 0 or rows.max() >= end:
                raise ValueError(f"{name}s are rows {rows.min()} to {rows.max()}, and there are {end}")
        example_P = np.repeat(np.arange(len(histories)), lengths_E)
        of_pair = histories.values, targets_E[example_P]
        # Twice the mean rank is an integer, so sums of ranks compare without rounding.
        evidence_P = _twice_mean_ranks(self._vector_cosine(*of_pair), example_P, histories)
        evidence_P += _twice_mean_ranks(self._co_interaction(*of_pair, users_E[example_P]), example_P, histories)
        order = np.lexsort((np.arange(len(example_P)), evidence_P, example_P))  # least evidence first, then the oldest
        place_in_order_P = np.arange(len(order)) - np.repeat(histories.offsets[:-1], lengths_E)
        by_share_E, by_bound_E = self.removals(lengths_E)
        kept_P = np.empty(len(order), dtype=bool)
        kept_P[order] = place_in_order_P >= np.repeat(by_share_E + by_bound_E, lengths_E)
        offsets = np.concatenate([[0], np.cumsum(lengths_E - by_share_E - by_bound_E)]).astype(np.int64)
        return RaggedArray(histories.values[kept_P], offsets)

    def removals(self, lengths_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many items of histories of these lengths are removed: int64 [E] by the share, and more by the bound."""
        by_share_E = np.minimum(np.floor(self.removed_share * lengths_E + 0.5).astype(np.int64), lengths_E - 1)
        if self.maximum_items is None:
            return by_share_E, np.zeros_like(by_share_E)
        return by_share_E, np.maximum(lengths_E - by_share_E - self.maximum_items, 0)

    def _vector_cosine(self, items_P: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
        """float64 [P], to six decimals: vectors that differ in length alone tie whatever the rounding."""
        cosine_P = np.empty(len(items_P))
        for start in range(0, len(items_P), BLOCK_PAIRS):
            part = slice(start, start + BLOCK_PAIRS)
            rows, targets = items_P[part], targets_P[part]
            dot = np.einsum("pd,pd->p", self.vectors_ID[rows], self.vectors_ID[targets], dtype=np.float64)
            norms = self.norms_I[rows] * self.norms_I[targets]
            cosine_P[part] = np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)
        return np.round(cosine_P, 6)

    def _co_interaction(self, items_P: np.ndarray, targets_P: np.ndarray, users_P: np.ndarray) -> np.ndarray:
        """float64 [P]: c(h, t)^2 / n(h) without the user, which orders a history as the cosine does, since n(t) is the
        same for all of it; as a quotient of integers it ties exactly where the cosines do."""
        own_P = self.train_UI[users_P, items_P] > 0
        both_P = self._users_of_both(items_P, targets_P) - (own_P & (self.train_UI[users_P, targets_P] > 0))
        of_item_P = self.users_I[items_P] - own_P
        return np.divide(both_P**2, of_item_P, out=np.zeros(len(both_P)), where=of_item_P > 0)

    def _users_of_both(self, items_P: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
        """float64 [P], exact integers: train users of both items. Counted target by target over the histories of the
        target's users, a block of targets at a time; no matrix of items x items is made."""
        wanted, target_P = np.unique(targets_P, return_inverse=True)
        by_target = np.argsort(target_P, kind="stable")
        ends = np.searchsorted(target_P[by_target], np.arange(0, len(wanted) + BLOCK_TARGETS, BLOCK_TARGETS))
        both_P = np.empty(len(items_P))
        for block, (start, end) in enumerate(pairwise(ends)):
            first, pairs = block * BLOCK_TARGETS, by_target[start:end]
            counts = (self.train_IU[wanted[first : first + BLOCK_TARGETS]] @ self.train_UI).sorted_indices()
            both_P[pairs] = counts[target_P[pairs] - first, items_P[pairs]]
        return both_P


def _twice_mean_ranks(values_P: np.ndarray, example_P: np.ndarray, histories: RaggedArray) -> np.ndarray:
    """int64 [P]: twice the rank of each value within its example, from 0 for the least; equal values share the mean."""
    order = np.lexsort((values_P, example_P))
    values, examples = values_P[order], example_P[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (values[1:] != values[:-1]) | (examples[1:] != examples[:-1])
    first = np.nonzero(begins)[0]
    last = np.append(first[1:], len(order)) - 1
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = (first + last)[np.cumsum(begins) - 1]
    return ranks - 2 * histories.offsets[:-1][example_P]
