"""The order of the curriculum: where the reasoning rows stand among the others in one pass."""

from __future__ import annotations

from math import isqrt

import numpy as np


def reasoning_positions(rows: int, reasoning_rows: int, *, uniform: bool) -> np.ndarray:
    """int64 [reasoning_rows], sorted and distinct: places of the R reasoning rows in a pass of N = `rows` rows in all.

    The uniform last pass has the same density R / N everywhere. In a growing pass (section 2 of the paper, with
    positions computed in advance) the density at place x is min(1, s x), and the slope s is the one that makes R rows
    in all, whatever the share of reasoning rows is:

        R <= N/2    s = 2 R / N^2, the density ends at 2 R / N; R (x / N)^2 rows stand before x
        R >  N/2    s = 1 / (2 (N - R)); from x = 2 (N - R) on every row is a reasoning row

    The k-th row stands where k + 1/2 rows of this line are passed, rounded down. So at every place the number of
    reasoning rows before it is within one half of the line, and no two rows share a place.

    Raises ValueError when R is negative or more than N.
    """
    if not 0 <= reasoning_rows <= rows:
        raise ValueError(f"{reasoning_rows} reasoning rows do not fit into a pass of {rows}")
    # In integers of any size, because a root that is off by a rounding error may put two rows into one place.
    halves = range(1, 2 * reasoning_rows, 2)
    others = rows - reasoning_rows
    if uniform:
        places = [half * rows // (2 * reasoning_rows) for half in halves]
    elif reasoning_rows <= others:
        places = [isqrt(half * rows**2 // (2 * reasoning_rows)) for half in halves]
    else:
        places = [isqrt(2 * half * others) if half <= 2 * others else half // 2 + others for half in halves]
    return np.array(places, dtype=np.int64)
