"""The prefix tree of all semantic IDs, as flat arrays.

Nodes are numbered breadth first in sorted order. So the children of a node are consecutive (a child is
`child_start[node] + rank`, no pointer is stored per edge), the nodes of a level are consecutive, and the items below a
node are consecutive in the sorted order of all items: `first_rank[node] .. first_rank[node] + items_below[node] - 1`.
What else one may ask of a node (its level, parent, path, item) follows from these and is not stored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.numpy

ROOT = 0
NO_NODE = -1
NO_ITEM = -1
# Bits of a sort key: the codes of a row, and its number where there is room.
_KEY_BITS = 64


@dataclass(frozen=True, eq=False)
class ItemTrie:
    """Flat arrays over N nodes; node 0 is the root.

    Attributes:
        child_start: int32 [N + 1]; the children of node n are `child_start[n] .. child_start[n + 1] - 1`.
        code: uint8, uint16 or int32 [N]; code of the edge into the node (0 and without meaning at the root).
        level_start: int64 [depth + 2]; the nodes of level l are `level_start[l] .. level_start[l + 1] - 1`.
        first_rank: int32 [N]; rank of the first item at or below the node. An item that is the beginning of others
            comes before them.
        items_below: int32 [N]; items whose path passes through the node or ends there.
        item_of_rank: int32 [items]; row of the item at each place of the sorted order.
        rank_of_item: int32 [items]; its inverse.
    """

    child_start: np.ndarray
    code: np.ndarray
    level_start: np.ndarray
    first_rank: np.ndarray
    items_below: np.ndarray
    item_of_rank: np.ndarray
    rank_of_item: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray, lengths: np.ndarray | None = None) -> ItemTrie:
        """Build from an integer array [items, depth]; row i uses its first `lengths[i]` codes (all when None).

        A row may be the beginning of another one. Raises ValueError for an empty array, a negative code, a length
        outside 1..depth, or two items with the same codes.
        """
        codes, lengths = _checked(codes, lengths)
        items = len(codes)
        sort = _Sorted.of(codes, lengths)
        ordered_lengths = None if lengths is None else lengths[sort.order]
        shortest, depth = (codes.shape[1],) * 2 if lengths is None else (int(lengths.min()), int(lengths.max()))
        distinct = sort.begins(depth - 1)
        if not distinct.all():
            rank = int(np.flatnonzero(~distinct)[0])
            first, second = sorted((int(sort.order[rank - 1]), int(sort.order[rank])))
            used = slice(None) if lengths is None else slice(int(lengths[first]))
            raise ValueError(
                f"item rows {first} and {second} have the same codes {codes[first, used].tolist()}; "
                "give items that collide a collision code"
            )

        level_codes, level_ranks, level_counts, level_starts = [], [], [], []
        nodes, above = 1, np.zeros(1, dtype=np.int64)  # nodes so far, and where those of the level above begin
        for level in range(depth):
            begins = sort.begins(level)
            if ordered_lengths is None or level < shortest:
                ranks = np.flatnonzero(begins)
                counts = np.diff(ranks, append=items)
            else:
                # Items that have ended above this level lie between its nodes and belong to none of them.
                begins &= ordered_lengths > level
                alive = np.flatnonzero(ordered_lengths > level)
                first_of_node = np.flatnonzero(begins[alive])
                ranks, counts = alive[first_of_node], np.diff(first_of_node, append=len(alive))
            # The first child of a node above is the first node here that does not come before it.
            before = np.cumsum(begins, dtype=np.int32)
            level_starts.append(nodes + before[above] - begins[above])
            level_codes.append(sort.codes(level, ranks))
            level_ranks.append(ranks.astype(np.int32))
            level_counts.append(counts.astype(np.int32))
            nodes, above = nodes + len(ranks), ranks
        level_start = np.cumsum([0, 1, *(len(ranks) for ranks in level_ranks)])
        child_start = np.concatenate([*level_starts, np.full(len(above) + 1, nodes)], dtype=np.int32)
        rank_of_item = np.empty(items, dtype=np.int32)
        rank_of_item[sort.order] = np.arange(items, dtype=np.int32)
        return cls(
            child_start=child_start,
            code=np.concatenate([np.zeros(1, dtype=level_codes[0].dtype), *level_codes]),
            level_start=level_start,
            first_rank=np.concatenate([np.zeros(1, dtype=np.int32), *level_ranks]),
            items_below=np.concatenate([np.array([items], dtype=np.int32), *level_counts]),
            item_of_rank=sort.order,
            rank_of_item=rank_of_item,
        )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the arrays as one safetensors file."""
        safetensors.numpy.save_file({name: getattr(self, name) for name in _FIELDS}, file)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> ItemTrie:
        """Map a file that `save` wrote into memory: pages are read when touched, and shared between processes."""
        # By way of torch, which is imported only here: safetensors maps a file for torch and copies it for NumPy.
        with safetensors.safe_open(Path(file), framework="pt") as content:
            return cls(**{name: content.get_tensor(name).numpy() for name in _FIELDS})

    @property
    def nodes(self) -> int:
        return len(self.code)

    @property
    def items(self) -> int:
        return len(self.item_of_rank)

    @property
    def depth(self) -> int:
        """Codes of the longest semantic ID."""
        return len(self.level_start) - 2

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, name).nbytes for name in _FIELDS)

    @cached_property
    def largest_fan_out(self) -> int:
        """Most children of a node."""
        return int(np.diff(self.child_start).max())

    def level(self, nodes: np.ndarray) -> np.ndarray:
        """int64 [B]: codes from the root to each node."""
        return np.searchsorted(self.level_start, nodes, side="right") - 1

    def child_count(self, nodes: np.ndarray) -> np.ndarray:
        """int32 [B]: number of children of each node."""
        return self.child_start[nodes + 1] - self.child_start[nodes]

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Follow one edge from each node: int [B] nodes and codes to int64 [B] children, -1 where there is none.

        A node or code of -1 leads nowhere. One binary search over the children of all rows together.
        """
        nodes, codes = np.asarray(nodes, dtype=np.int64), np.asarray(codes, dtype=np.int64)
        known = np.maximum(nodes, ROOT)
        low, stop = self.child_start[known].astype(np.int64), self.child_start[known + 1].astype(np.int64)
        high = stop
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) >> 1
            below = (low < high) & (self.code[np.minimum(middle, self.nodes - 1)] < codes)
            low, high = np.where(below, middle + 1, low), np.where(below, high, np.minimum(middle, high))
        found = (nodes >= 0) & (low < stop) & (self.code[np.minimum(low, self.nodes - 1)] == codes)
        return np.where(found, low, NO_NODE)

    def walk(self, codes: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """int64 [B]: the node that each history of codes leads to from the root, -1 where it leaves the trie.

        Args:
            codes: int [B, steps]; row b uses its first `lengths[b]` codes (all when None).
        """
        codes = np.asarray(codes, dtype=np.int64)
        nodes = np.full(len(codes), ROOT, dtype=np.int64)
        for step in range(codes.shape[1]):
            moving = np.ones(len(codes), dtype=bool) if lengths is None else step < np.asarray(lengths)
            nodes[moving] = self.step(nodes[moving], codes[moving, step])
        return nodes

    def contains(self, codes: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """bool [B]: whether each row of codes (as in `walk`) is the whole semantic ID of an item."""
        nodes = self.walk(codes, lengths)
        return (nodes != NO_NODE) & (self.item(np.maximum(nodes, ROOT)) != NO_ITEM)

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of each node, ragged: flat int64 child nodes and int64 [B + 1] offsets."""
        nodes = np.asarray(nodes, dtype=np.int64)
        first = self.child_start[nodes].astype(np.int64)
        counts = self.child_start[nodes + 1] - first
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], counts), offsets

    def item(self, nodes: np.ndarray) -> np.ndarray:
        """int64 [B]: row of the item that ends at each node, -1 where none does."""
        nodes = np.asarray(nodes, dtype=np.int64)
        first_child, rank = self.child_start[nodes], self.first_rank[nodes]
        # An item that ends here comes before all items of the children.
        ends = (self.child_start[nodes + 1] == first_child) | (
            self.first_rank[np.minimum(first_child, self.nodes - 1)] != rank
        )
        return np.where(ends, self.item_of_rank[rank].astype(np.int64), NO_ITEM)

    def paths(self, items: np.ndarray) -> np.ndarray:
        """int64 [B, depth]: the nodes from the first level down to where each item ends, -1 after that."""
        rank = self.rank_of_item[np.asarray(items, dtype=np.int64)]
        paths = np.full((len(rank), self.depth), NO_NODE, dtype=np.int64)
        for level in range(1, self.depth + 1):
            start, stop = self.level_start[level], self.level_start[level + 1]
            node = start + np.searchsorted(self.first_rank[start:stop], rank, side="right") - 1
            inside = (node >= start) & (rank < self.first_rank[node] + self.items_below[node])
            paths[inside, level - 1] = node[inside]
        return paths

    def parent(self, nodes: np.ndarray) -> np.ndarray:
        """int64 [B]: the node above each node, -1 for the root."""
        return np.where(np.asarray(nodes) > ROOT, np.searchsorted(self.child_start, nodes, side="right") - 1, NO_NODE)

    def prefix(self, node: int) -> tuple[int, ...]:
        """Codes from the root to a node."""
        codes: list[int] = []
        while node > ROOT:
            codes.append(int(self.code[node]))
            node = int(self.parent(np.array([node]))[0])
        return tuple(reversed(codes))


_FIELDS = ("child_start", "code", "level_start", "first_rank", "items_below", "item_of_rank", "rank_of_item")


def _checked(codes: np.ndarray, lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The arguments of `build`, looked through; lengths that are all the depth become None."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[0] == 0 or codes.shape[1] == 0:
        raise ValueError(f"codes must be a non-empty array [items, depth], got shape {codes.shape}")
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    items, depth = codes.shape
    if items > np.iinfo(np.int32).max:
        raise ValueError(f"{items} items are more than the {np.iinfo(np.int32).max} that a trie can number")
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape != (items,) or lengths.min() < 1 or lengths.max() > depth:
            raise ValueError(f"lengths must be an array [items] of values in 1..{depth}")
        if lengths.min() == depth:
            lengths = None
    for level in range(depth):
        negative = (codes[:, level] < 0) & (True if lengths is None else lengths > level)
        if negative.any():
            row = int(np.flatnonzero(negative)[0])
            raise ValueError(f"item row {row} has a negative code: {codes[row].tolist()}")
    return codes, lengths


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Rows of codes in sorted order, packed into as few 64-bit keys as hold them (one for 4 x 256 and 2^24 items).

    Attributes:
        keys: uint64 [items] each, the first one sorting before the next.
        fields: per level (key, shift, bits, padded); a padded field holds the code + 1, and 0 where the row has ended.
        order: int32 [items], the row at each place.
        code_type: smallest type that holds every code.
    """

    keys: list[np.ndarray]
    fields: list[tuple[int, int, int, int]]
    order: np.ndarray
    code_type: np.dtype

    @classmethod
    def of(cls, codes: np.ndarray, lengths: np.ndarray | None) -> _Sorted:
        items, depth = codes.shape
        shortest = depth if lengths is None else int(lengths.min())
        groups: list[list[tuple[int, int, int]]] = [[]]  # per key: (level, bits, padded)
        largest_code = 0
        for level in range(depth):
            padded = int(level >= shortest)
            used = codes[:, level] if lengths is None or not padded else codes[lengths > level, level]
            largest = int(used.max(initial=0))
            largest_code = max(largest_code, largest)
            bits = max(1, (largest + padded).bit_length())
            if sum(b for _, b, _ in groups[-1]) + bits > _KEY_BITS:
                groups.append([])
            groups[-1].append((level, bits, padded))
        row_bits = (items - 1).bit_length()
        with_rows = len(groups) == 1 and sum(bits for _, bits, _ in groups[0]) + row_bits <= _KEY_BITS
        keys, fields = [], []
        for number, group in enumerate(groups):
            key = np.zeros(items, dtype=np.uint64)
            shift = sum(bits for _, bits, _ in group) + (row_bits if with_rows else 0)
            for level, bits, padded in group:
                shift -= bits
                field = codes[:, level].astype(np.uint64)
                if lengths is not None and padded:
                    field += np.uint64(1)
                    field[lengths <= level] = 0
                key |= field << np.uint64(shift)
                fields.append((number, shift, bits, padded))
            keys.append(key)
        code_type = np.dtype(np.uint8 if largest_code < 2**8 else np.uint16 if largest_code < 2**16 else np.int32)
        if with_rows:
            # The row in the low bits: sorting values is several times faster than sorting row numbers by them.
            keys[0] |= np.arange(items, dtype=np.uint64)
            keys[0].sort()
            order = (keys[0] & np.uint64((1 << row_bits) - 1)).astype(np.int32)
        else:
            order = np.lexsort(keys[::-1]).astype(np.int32)
            keys = [key[order] for key in keys]
        return cls(keys, fields, order, code_type)

    def begins(self, level: int) -> np.ndarray:
        """bool [items]: whether the row differs from the one before it in this code or an earlier one."""
        number, shift, _, _ = self.fields[level]
        begins = np.ones(len(self.order), dtype=bool)
        key = self.keys[number]
        np.not_equal(key[1:] >> np.uint64(shift), key[:-1] >> np.uint64(shift), out=begins[1:])
        for earlier in self.keys[:number]:
            begins[1:] |= earlier[1:] != earlier[:-1]
        return begins

    def codes(self, level: int, ranks: np.ndarray) -> np.ndarray:
        """Codes of a level at some places."""
        number, shift, bits, padded = self.fields[level]
        field = (self.keys[number][ranks] >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        return (field - np.uint64(padded)).astype(self.code_type)
