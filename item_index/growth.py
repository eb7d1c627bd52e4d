"""A changing catalogue: newcomers get semantic IDs beside the existing ones; those of items that left stay taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from item_index.semantic_ids import PADDING, SemanticIdIndex


@dataclass(frozen=True)
class Growth:
    """An index for a changed catalogue, and what changed.

    Attributes:
        index: its rows follow the new catalogue.
        added: items that are new.
        returned: items that had been retired and have their semantic ID again.
        retired: items that have left with this change.
        tokens_to_add: tokens that a checkpoint of the former index lacks; none while spare collision codes suffice.
    """

    index: SemanticIdIndex
    added: int
    returned: int
    retired: int
    tokens_to_add: tuple[str, ...]


def newcomer_rows(index: SemanticIdIndex, item_ids: Sequence[str | int]) -> np.ndarray:
    """int64 rows of `item_ids` that the index has never seen, in their order: these need vectors and codes."""
    return np.flatnonzero(_places(index, item_ids) < 0)


def grow_index(
    index: SemanticIdIndex,
    item_ids: Sequence[str | int],
    newcomer_codes_NH: np.ndarray,
    *,
    spare_collision_codes: int = 8,
) -> Growth:
    """The index of a new catalogue in which every item that was there before keeps its semantic ID.

    A newcomer whose residual codes nobody has or had gets them bare; newcomers that share such codes all get a
    collision code, as in a first assignment. Where the codes are or were somebody's, it gets the next collision code
    after all that were ever given out there; so a bare semantic ID may become the beginning of another. Sections 1.4
    and 1.5.

    Args:
        item_ids: the new catalogue, distinct ids; items of the index that are not in it are retired.
        newcomer_codes_NH: integers [newcomers, H], nearest centroids of `newcomer_rows(index, item_ids)`, in order.
        spare_collision_codes: collision codes added beyond the largest one used, where the reserved ones are too few.

    Raises ValueError for repeated ids or codes of the wrong shape or outside their level.
    """
    if len(set(item_ids)) != len(item_ids):
        raise ValueError("item ids must be distinct")
    place = _places(index, item_ids)
    newcomers = np.flatnonzero(place < 0)
    levels = index.levels
    fresh = np.asarray(newcomer_codes_NH)
    if fresh.shape != (len(newcomers), levels):
        raise ValueError(f"codes of shape {fresh.shape} for {len(newcomers)} newcomers and {levels} levels")
    if ((fresh < 0) | (fresh >= np.array(index.level_sizes))).any():
        raise ValueError(f"newcomers' codes must lie below the level sizes {list(index.level_sizes)}")

    # Whoever ever had a semantic ID, items first, then retired ones: `place` counts along these rows.
    known = _with_collision_column(
        np.concatenate([index.codes_IL, index.retired_codes_RL.reshape(-1, index.depth)]), levels
    )
    known_ids = (*index.item_ids, *index.retired_ids)
    _, group = np.unique(np.concatenate([known[:, :levels], fresh]), axis=0, return_inverse=True)
    groups = int(group.max(initial=-1)) + 1
    group_of_known, group_of_fresh = group[: len(known)], group[len(known) :]
    next_free = np.full(groups, -1, dtype=np.int64)  # -1: nobody has or had these residual codes
    np.maximum.at(next_free, group_of_known, known[:, levels] + 1)  # a bare semantic ID counts as collision code -1
    by_group = np.argsort(group_of_fresh, kind="stable")
    counts = np.bincount(group_of_fresh, minlength=groups)
    ordinal = np.empty(len(fresh), dtype=np.int64)
    ordinal[by_group] = np.arange(len(fresh)) - np.repeat(np.cumsum(counts) - counts, counts)
    bare = (next_free[group_of_fresh] < 0) & (counts[group_of_fresh] == 1)
    collision = np.where(bare, PADDING, np.maximum(next_free[group_of_fresh], 0) + ordinal)

    codes = np.empty((len(item_ids), levels + 1), dtype=np.int32)
    kept = place >= 0
    codes[kept] = known[place[kept]]
    codes[newcomers] = np.column_stack([fresh, collision])
    stays = np.zeros(len(known), dtype=bool)
    stays[place[kept]] = True
    gone = np.flatnonzero(~stays)
    retired_codes = known[gone]

    needed = int(max(codes[:, levels].max(initial=-1), retired_codes[:, levels].max(initial=-1))) + 1
    collision_size = index.collision_size if needed <= index.collision_size else needed + spare_collision_codes
    depth = levels + int(needed > 0)
    grown = SemanticIdIndex(
        item_ids=tuple(item_ids),
        codes_IL=np.ascontiguousarray(codes[:, :depth]),
        lengths_I=(levels + (codes[:, levels] >= 0)).astype(np.int32),
        level_sizes=index.level_sizes,
        collision_size=collision_size,
        codebooks=index.codebooks,
        retired_ids=tuple(known_ids[row] for row in gone),
        retired_codes_RL=np.ascontiguousarray(retired_codes[:, :depth]),
        retired_lengths_R=(levels + (retired_codes[:, levels] >= 0)).astype(np.int32),
    )
    items = len(index)
    return Growth(
        index=grown,
        added=len(newcomers),
        returned=int(np.count_nonzero(place >= items)),
        retired=int(np.count_nonzero(gone < items)),
        tokens_to_add=tuple(grown.token(levels, code) for code in range(index.collision_size, collision_size)),
    )


def _places(index: SemanticIdIndex, item_ids: Sequence[str | int]) -> np.ndarray:
    """int64 [items]: each id's row among the index's items and, after them, its retired ones; -1 for newcomers."""
    known = pa.array([*index.item_ids, *index.retired_ids])
    found = pc.index_in(pa.array(list(item_ids)), value_set=known)
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _with_collision_column(codes_IL: np.ndarray, levels: int) -> np.ndarray:
    """int32 [items, H + 1]: the codes with a collision column, padded where the index has none."""
    if codes_IL.shape[1] == levels + 1:
        return codes_IL
    return np.column_stack([codes_IL, np.full(len(codes_IL), PADDING, dtype=np.int32)])
