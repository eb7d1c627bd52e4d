"""The residual-sensitive verifiable reward (RSVR) of GREAM, arXiv 2510.20815."""

from __future__ import annotations

import math
from collections.abc import Sequence

# What an answer that is not the true item can earn at most: all residual levels right, the collision code wrong.
NEAR_MISS_CAP = 0.95


def residual_sensitive_reward(
    answer: Sequence[int], truth: Sequence[int], *, levels: int = 4, well_formed: bool = True
) -> float:
    """Reward of one answered semantic ID, in [0, 1].

    With l the length of the common prefix and H the residual levels: 1 for the true item, 0 for l = 0, otherwise
    min(sqrt(l / H), 0.95); and 0 for every response that is not well formed. A right code counts only where all codes
    above it are right, because a residual code means nothing under another parent.

    Args:
        answer: answered codes, that of level l at place l, the collision code included where there is one; may be
            empty or cut short (its common prefix is then short as well).
        truth: codes of the true item, in the same form: `levels` codes, or `levels + 1` with a collision code.
        levels: H, residual levels without the collision level.
        well_formed: f of the formula, whether the response has the format its mode requires.

    Raises:
        ValueError: `levels` is not positive, or `truth` has neither `levels` nor `levels + 1` codes.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if len(truth) not in (levels, levels + 1):
        raise ValueError(
            f"truth has {len(truth)} codes, expected {levels}, or {levels + 1} with a collision code: {list(truth)}"
        )
    if not well_formed:
        return 0.0
    common = 0
    for answered, true in zip(answer, truth, strict=False):
        if answered != true:
            break
        common += 1
    if common == len(answer) == len(truth):
        return 1.0
    return min(math.sqrt(common / levels), NEAR_MISS_CAP)
