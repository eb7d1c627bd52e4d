from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation.results import SHOWN_METRICS, ranking_result, results_markdown, write_rankings
from item_index.ragged import RaggedArray

INTERACTIONS = np.array([1, 2, 2, 9, 9, 9])
RANKED = np.array([[1, 3, 4, 5, 2, -1], [5, 4, 3, 2, -1, -1]])
HISTORIES = RaggedArray.of([[0], [0, 1, 1]], np.int64)


def test_cold_and_warm_targets_are_measured_apart() -> None:
    result = ranking_result(RANKED, np.array([1, 3]), HISTORIES, INTERACTIONS, cold_share=0.5)
    assert result.metrics["users/cold"] == result.metrics["users/warm"] == 1
    assert result.metrics["recall@10/cold"] == result.metrics["ndcg@10/cold"] == 1
    assert result.metrics["ndcg@10/warm"] == 0.5
    assert result.metrics["ndcg@10"] == 0.75
    np.testing.assert_array_equal(result.measures["ndcg@10"], [1, 0.5])
    assert result.ranked_UK is RANKED


@pytest.mark.parametrize(("cold_share", "cold_users"), [(0.0, 0), (0.3, 1), (1.0, 2)])
def test_an_item_is_cold_up_to_a_share_of_the_catalogue(cold_share: float, cold_users: int) -> None:
    metrics = ranking_result(RANKED, np.array([2, 3]), HISTORIES, INTERACTIONS, cold_share=cold_share).metrics
    assert metrics.get("users/cold", 0) == cold_users
    assert metrics.get("users/warm", 0) == 2 - cold_users
    assert ("ndcg@10/cold" in metrics) == (cold_users > 0)


def test_places_without_an_unseen_item_are_not_valid() -> None:
    full = ranking_result(RANKED, np.array([1, 3]), HISTORIES, INTERACTIONS, cold_share=0.5)
    assert full.metrics["valid_rate"] == 1.0  # five unseen items of the first user, four of the second
    seen = RANKED.copy()
    seen[1, 0] = 1
    wrong = ranking_result(seen, np.array([1, 3]), HISTORIES, INTERACTIONS, cold_share=0.5)
    assert wrong.metrics["valid_rate"] == pytest.approx(8 / 9)


@pytest.mark.parametrize("item_ids", [("a", "b", "c", "d", "e", "f"), (10, 11, 12, 13, 14, 15)])
def test_rankings_are_kept_under_the_users_ids(tmp_path: Path, item_ids: tuple[str | int, ...]) -> None:
    file = tmp_path / "rankings.parquet"
    write_rankings(file, {"one": RANKED, "two": RANKED[:, :2]}, np.array([1, 3]), ["x", "y"], item_ids)
    rows = pq.read_table(file).to_pylist()
    assert [(row["system"], row["user_id"], row["target"]) for row in rows] == [
        ("one", "x", item_ids[1]), ("one", "y", item_ids[3]), ("two", "x", item_ids[1]), ("two", "y", item_ids[3])
    ]  # fmt: skip
    assert rows[0]["items"] == [item_ids[item] for item in (1, 3, 4, 5, 2)]
    assert rows[3]["items"] == [item_ids[5], item_ids[4]]


def test_the_table_has_a_line_for_each_system() -> None:
    lines = results_markdown({"one": dict.fromkeys(SHOWN_METRICS, 0.25), "two": {}}).splitlines()
    assert lines[2] == "| one | " + " | ".join(["0.2500"] * len(SHOWN_METRICS)) + " |"
    assert lines[3].count("nan") == len(SHOWN_METRICS)
