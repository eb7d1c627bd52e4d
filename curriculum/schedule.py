"""The order of the curriculum: where the reasoning rows stand among the others in one pass."""

from __future__ import annotations

import numpy as np


def reasoning_positions(rows: int, reasoning_rows: int, *, uniform: bool) -> np.ndarray:
    """int64 [reasoning_rows], sorted: places of the reasoning rows in a pass of `rows` rows in all.

    Their density grows linearly from zero over the pass, or is the same everywhere for the uniform last pass
    (section 2 of the paper, with positions computed in advance). The k-th row stands where the cumulative share
    reaches (k + 1/2) / n; neighbours that would share a place move apart.
    """
    if not 0 <= reasoning_rows <= rows:
        raise ValueError(f"{reasoning_rows} reasoning rows do not fit into a pass of {rows}")
    if reasoning_rows == 0:
        return np.zeros(0, dtype=np.int64)
    share = (np.arange(reasoning_rows) + 0.5) / reasoning_rows
    places = np.floor(rows * (share if uniform else np.sqrt(share))).astype(np.int64)
    rank = np.arange(reasoning_rows)
    places = np.maximum.accumulate(places - rank) + rank  # strictly increasing
    return np.minimum(places, rows - reasoning_rows + rank)  # and inside the pass
