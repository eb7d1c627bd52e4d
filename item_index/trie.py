"""The prefix tree of all semantic IDs, as flat arrays.

Nodes are numbered breadth first in sorted order, so the children of a node are consecutive and a child is
`child_start[node] + rank`: no pointer is stored per edge. Node 0 is the root; node `n > 0` is entered by the code
`code[n]`, and all edges, sorted by (parent, code), are the nodes 1..N-1 in their own order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROOT = 0
NO_NODE = -1
NO_ITEM = -1


@dataclass(frozen=True)
class ItemTrie:
    """Flat arrays over N nodes.

    Attributes:
        child_start: int32 [N + 1]; the children of node n are `child_start[n] .. child_start[n + 1] - 1`.
        code: int32 [N]; code of the edge into the node (-1 for the root).
        level: int8 [N]; codes from the root to the node (0 for the root).
        parent: int32 [N]; -1 for the root.
        item: int32 [N]; row of the item that ends at the node, -1 where none does.
        leaf: int32 [items]; the node at which each item ends.
    """

    child_start: np.ndarray
    code: np.ndarray
    level: np.ndarray
    parent: np.ndarray
    item: np.ndarray
    leaf: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray, lengths: np.ndarray | None = None) -> ItemTrie:
        """Build from an integer array [items, depth]; row i uses its first `lengths[i]` codes (all when None).

        A row may be the beginning of another one. Raises ValueError for an empty array, a negative code, a length
        outside 1..depth, or two items with the same codes.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[0] == 0 or codes.shape[1] == 0:
            raise ValueError(f"codes must be a non-empty array [items, depth], got shape {codes.shape}")
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        items, depth = codes.shape
        lengths = np.full(items, depth) if lengths is None else np.asarray(lengths)
        if lengths.shape != (items,) or lengths.min() < 1 or lengths.max() > depth:
            raise ValueError(f"lengths must be an array [items] of values in 1..{depth}")
        used = np.arange(depth)[None, :] < lengths[:, None]
        if (codes[used] < 0).any():
            row = int(np.nonzero((used & (codes < 0)).any(axis=1))[0][0])
            raise ValueError(f"item row {row} has a negative code: {codes[row].tolist()}")
        # Padding sorts before every code, so an item that is the beginning of another comes first.
        padded = np.where(used, codes, -1).astype(np.int64)
        order = np.lexsort(padded.T[::-1])
        ordered, ordered_lengths = padded[order], lengths[order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        if same.any():
            first = int(np.nonzero(same)[0][0])
            rows = sorted((int(order[first]), int(order[first + 1])))
            raise ValueError(
                f"item rows {rows[0]} and {rows[1]} have the same codes {codes[rows[0]].tolist()}; "
                "give items that collide a collision code"
            )

        code_parts, parent_parts, level_parts = [np.array([-1])], [np.array([-1])], [np.array([0])]
        node_of_row = np.zeros(items, dtype=np.int64)  # the node each ordered row has reached so far
        leaf = np.zeros(items, dtype=np.int32)
        nodes = 1
        for depth_now in range(depth):
            alive = np.nonzero(ordered_lengths > depth_now)[0]
            if alive.size == 0:
                break
            parents, column = node_of_row[alive], ordered[alive, depth_now]
            fresh = np.ones(alive.size, dtype=bool)
            fresh[1:] = (parents[1:] != parents[:-1]) | (column[1:] != column[:-1])
            node_of_row[alive] = nodes + np.cumsum(fresh) - 1
            code_parts.append(column[fresh])
            parent_parts.append(parents[fresh])
            level_parts.append(np.full(int(fresh.sum()), depth_now + 1))
            nodes += int(fresh.sum())
            ends = alive[ordered_lengths[alive] == depth_now + 1]
            leaf[order[ends]] = node_of_row[ends]

        parent = np.concatenate(parent_parts).astype(np.int32)
        child_start = np.searchsorted(parent[1:], np.arange(nodes + 1), side="left") + 1
        item = np.full(nodes, NO_ITEM, dtype=np.int32)
        item[leaf] = np.arange(items, dtype=np.int32)
        return cls(
            child_start=child_start.astype(np.int32),
            code=np.concatenate(code_parts).astype(np.int32),
            level=np.concatenate(level_parts).astype(np.int8),
            parent=parent,
            item=item,
            leaf=leaf,
        )

    @property
    def nodes(self) -> int:
        return len(self.code)

    @property
    def items(self) -> int:
        return len(self.leaf)

    @cached_property
    def depth(self) -> int:
        """Codes of the longest semantic ID."""
        return int(self.level.max())

    @cached_property
    def child_count(self) -> np.ndarray:
        """int32 [N]: number of children."""
        return np.diff(self.child_start).astype(np.int32)

    @cached_property
    def ancestors(self) -> np.ndarray:
        """int32 [items, depth]: the nodes on the path to each item, its own leaf last, -1 after it."""
        paths = np.full((self.items, self.depth), NO_NODE, dtype=np.int32)
        node = self.leaf.copy()
        while True:
            inside = np.nonzero(node > ROOT)[0]
            if inside.size == 0:
                return paths
            paths[inside, self.level[node[inside]] - 1] = node[inside]
            node[inside] = self.parent[node[inside]]

    @cached_property
    def items_below(self) -> np.ndarray:
        """int32 [N]: items whose path passes through the node or ends there."""
        counts = np.bincount(self.ancestors[self.ancestors > ROOT], minlength=self.nodes).astype(np.int32)
        counts[ROOT] = self.items
        return counts

    @cached_property
    def _edge_keys(self) -> np.ndarray:
        return self.parent[1:].astype(np.int64) * self._code_base + self.code[1:]

    @cached_property
    def _code_base(self) -> int:
        return int(self.code.max()) + 1

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Follow one edge from each node: int [B] nodes and codes to int64 [B] children, -1 where there is none."""
        nodes, codes = np.asarray(nodes, dtype=np.int64), np.asarray(codes, dtype=np.int64)
        keys = nodes * self._code_base + codes
        place = np.searchsorted(self._edge_keys, keys)
        found = (nodes >= 0) & (codes >= 0) & (codes < self._code_base) & (place < len(self._edge_keys))
        found &= self._edge_keys[np.minimum(place, len(self._edge_keys) - 1)] == keys
        return np.where(found, place + 1, NO_NODE)

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of each node, ragged: flat int64 child nodes and int64 [B + 1] offsets."""
        nodes = np.asarray(nodes, dtype=np.int64)
        counts = self.child_count[nodes].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        return np.repeat(self.child_start[nodes].astype(np.int64), counts) + within, offsets

    def excluded_below(self, items: np.ndarray) -> np.ndarray:
        """int32 [N]: how many of the given (distinct) items lie at or below each node."""
        paths = self.ancestors[np.asarray(items, dtype=np.int64)]
        counts = np.bincount(paths[paths > ROOT], minlength=self.nodes).astype(np.int32)
        counts[ROOT] = len(items)
        return counts
