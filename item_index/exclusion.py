"""Items that must not be answered, per response (seen ones for example), asked of any node of the trie as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from item_index.trie import ItemTrie


@dataclass(frozen=True, eq=False)
class ExcludedItems:
    """Excluded items of R rows as one sorted array.

    The items below a trie node are consecutive ranks, so how many of a row's excluded items lie there is the difference
    of two binary searches: memory grows with the excluded items, not with rows times nodes.

    Attributes:
        keys: int64 [E], row x stride + rank of the item, sorted.
        stride: one more than the largest rank.
    """

    keys: np.ndarray
    stride: int

    @classmethod
    def of(cls, trie: ItemTrie, items: Sequence[np.ndarray | Sequence[int] | None]) -> ExcludedItems:
        """From item rows per row (None or empty: nothing is excluded); repeated items count once."""
        counts = [0 if row is None else len(row) for row in items]
        flat = [np.asarray(row, dtype=np.int64) for row in items if row is not None and len(row)]
        if not flat:
            return cls(np.zeros(0, dtype=np.int64), trie.items)
        ranks = trie.rank_of_item[np.concatenate(flat)].astype(np.int64)
        return cls(np.unique(np.repeat(np.arange(len(items)), counts) * trie.items + ranks), trie.items)

    def __len__(self) -> int:
        return len(self.keys)

    def below(self, trie: ItemTrie, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """int64 [B]: excluded items of each row at or below the row's node."""
        first = np.asarray(rows, dtype=np.int64) * self.stride + trie.first_rank[nodes]
        return np.searchsorted(self.keys, first + trie.items_below[nodes]) - np.searchsorted(self.keys, first)

    def open(self, trie: ItemTrie, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """bool [B]: whether an item that may be answered lies at or below each node."""
        if not len(self):
            return np.ones(np.shape(nodes), dtype=bool)
        return self.below(trie, rows, nodes) < trie.items_below[nodes]

    def holds_item_at(self, trie: ItemTrie, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """bool [B]: whether the item that ends at each node is excluded (for nodes at which one ends)."""
        if not len(self):
            return np.zeros(np.shape(nodes), dtype=bool)
        key = np.asarray(rows, dtype=np.int64) * self.stride + trie.first_rank[nodes]
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return self.keys[place] == key
