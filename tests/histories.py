"""Users' items in time order, for what counts over them: by hand, and drawn by hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

ITEMS = 6
histories_strategy = st.lists(
    st.lists(st.integers(0, ITEMS - 1), max_size=8).map(lambda row: np.array(row, dtype=np.int64)),
    min_size=1,
    max_size=6,
)


def rows(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in lists]
