"""Systems compared on the same users: the paired difference of a measure, with its 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from evaluation.metrics import paired_bootstrap

COMPARED_MEASURES = ("recall@10", "ndcg@10", "recall@50")


@dataclass(frozen=True)
class Comparison:
    """By how much `system` is above `against` in the mean of `measure` over the same users, and the 95 % interval."""

    measure: str
    system: str
    against: str
    difference: float
    low: float
    high: float


def compare(
    measures: Mapping[str, Mapping[str, np.ndarray]], pairs: Iterable[tuple[str, str]], *, seed: int
) -> list[Comparison]:
    """Each pair (system, against) in each of `COMPARED_MEASURES`, by paired bootstrap over users.

    `measures` holds float64 [users] by system and measure. Raises ValueError for systems of other users.
    """
    found = []
    for system, against in pairs:
        for measure in COMPARED_MEASURES:
            interval = paired_bootstrap(measures[against][measure], measures[system][measure], seed=seed)
            found.append(Comparison(measure, system, against, *interval))
    return found


def comparisons_markdown(comparisons: Iterable[Comparison]) -> str:
    """A table; a difference whose interval does not hold 0 is in bold."""
    lines = ["| measure | system | against | difference | 95 % interval |", "|---" * 5 + "|"]
    for row in comparisons:
        mark = "**" if row.low > 0 or row.high < 0 else ""
        lines.append(
            f"| {row.measure} | {row.system} | {row.against} | {mark}{row.difference:+.4f}{mark} "
            f"| {row.low:+.4f} .. {row.high:+.4f} |"
        )
    return "\n".join(lines) + "\n"


def as_records(comparisons: Iterable[Comparison]) -> list[dict[str, str | float]]:
    """For a JSON file."""
    return [asdict(row) for row in comparisons]
