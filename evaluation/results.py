"""What an evaluation finds out about a system, and the files that keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.exposure import exposure_metrics
from evaluation.metrics import ranking_measures
from item_index.ragged import RaggedArray

SHOWN_METRICS = ("recall@1", "recall@5", "recall@10", "recall@50", "ndcg@5", "ndcg@10", "coverage@10", "valid_rate")
SLICED_MEASURES = ("recall@10", "ndcg@10")


@dataclass(frozen=True)
class SystemResult:
    """Of one system: metrics by name, measures by name (float64 [users]) and ranked items [users, K] (-1: no item)."""

    metrics: dict[str, float]
    measures: dict[str, np.ndarray]
    ranked_UK: np.ndarray


def ranking_result(
    ranked_UK: np.ndarray,
    targets_U: np.ndarray,
    histories: RaggedArray,
    interactions_I: np.ndarray,
    *,
    cold_share: float,
) -> SystemResult:
    """Measure ranked lists of the whole catalogue, each without the items of its user's history.

    Metrics are the means of `ranking_measures`, `exposure_metrics`, and

    - `valid_rate`: the share of the lists' places that hold an item of the catalogue which is not in the history;
    - `recall@10/cold`, `ndcg@10/cold` over `users/cold` users whose target is a cold item, and the same for `warm`: an
      item is cold when it has no more interactions than the one at `cold_share` of the catalogue, fewest first. A slice
      without users has no metrics.

    Args:
        ranked_UK: integers [users, K], item rows from best to worst, -1 after the end of a shorter list.
        targets_U: integers [users], item rows.
        histories: item rows of each user before the target.
        interactions_I: [items], interactions of each item in the train part.
    """
    items = len(interactions_I)
    measures = ranking_measures(ranked_UK, targets_U, items=items)
    metrics = {name: float(values_U.mean()) for name, values_U in measures.items()}
    metrics |= exposure_metrics(ranked_UK, histories, interactions_I)
    expected = np.minimum(ranked_UK.shape[1], items - np.array([len(np.unique(history)) for history in histories]))
    fresh = [np.setdiff1d(ranked[ranked >= 0], seen) for ranked, seen in zip(ranked_UK, histories, strict=True)]
    metrics["valid_rate"] = float(sum(len(row) for row in fresh) / expected.sum())
    cold_I = interactions_I <= np.quantile(interactions_I, cold_share, method="lower")
    for name, slice_U in {"cold": cold_I[targets_U], "warm": ~cold_I[targets_U]}.items():
        if slice_U.any():
            metrics[f"users/{name}"] = float(slice_U.sum())
            metrics |= {f"{measure}/{name}": float(measures[measure][slice_U].mean()) for measure in SLICED_MEASURES}
    return SystemResult(metrics, measures, ranked_UK)


def write_rankings(
    file: Path,
    rankings: Mapping[str, np.ndarray],
    targets_U: np.ndarray,
    user_ids: Sequence[str | int],
    item_ids: Sequence[str | int],
) -> None:
    """Every system's list for every user as Parquet: system, user_id, target, and items, best first; the user's ids."""
    ids = pa.array(item_ids)
    tables = []
    for system, ranked_UK in rankings.items():
        ranked = RaggedArray.of([row[row >= 0] for row in ranked_UK], np.int64)
        columns = {
            "system": pa.array([system] * len(ranked_UK)),
            "user_id": pa.array(user_ids),
            "target": ids.take(pa.array(targets_U)),
            "items": pa.ListArray.from_arrays(pa.array(ranked.offsets, pa.int32()), ids.take(pa.array(ranked.values))),
        }
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), file)


def results_markdown(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the shown metrics, one line for each system."""
    lines = ["| | " + " | ".join(SHOWN_METRICS) + " |", "|---" * (len(SHOWN_METRICS) + 1) + "|"]
    for system, values in metrics.items():
        lines.append(
            f"| {system} | " + " | ".join(f"{values.get(name, float('nan')):.4f}" for name in SHOWN_METRICS) + " |"
        )
    return "\n".join(lines) + "\n"
