from __future__ import annotations

import numpy as np
import pytest

from evaluation.comparison import COMPARED_MEASURES, Comparison, as_records, compare, comparisons_markdown


def measures(values: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values for name in COMPARED_MEASURES}


def test_pairs_are_compared_user_by_user() -> None:
    generator = np.random.default_rng(0)
    before = generator.random(500)
    systems = {"sft": measures(before), "srpo": measures(before + 0.1), "other": measures(generator.random(500))}
    found = compare(systems, [("srpo", "sft"), ("srpo", "other")], seed=1)
    assert [(row.measure, row.system, row.against) for row in found] == [
        (name, "srpo", against) for against in ("sft", "other") for name in COMPARED_MEASURES
    ]
    assert found[0].difference == pytest.approx(0.1)
    assert found[0].low == pytest.approx(0.1)  # every user gains the same, so there is nothing to doubt
    assert found[0].high == pytest.approx(0.1)
    apart = found[3]
    assert apart.low < apart.difference < apart.high
    assert apart.high - apart.low > 0.05
    with pytest.raises(ValueError, match="the same users"):
        compare({**systems, "few": measures(before[:5])}, [("few", "sft")], seed=1)


def test_clear_differences_are_in_bold() -> None:
    clear = Comparison("ndcg@10", "srpo", "sft", 0.02, 0.01, 0.03)
    unclear = Comparison("recall@10", "srpo", "sft", 0.02, -0.01, 0.03)
    lower = Comparison("recall@10", "sft", "srpo", -0.02, -0.03, -0.01)
    table = comparisons_markdown([clear, unclear, lower]).splitlines()
    assert table[2] == "| ndcg@10 | srpo | sft | **+0.0200** | +0.0100 .. +0.0300 |"
    assert table[3] == "| recall@10 | srpo | sft | +0.0200 | -0.0100 .. +0.0300 |"
    assert "**-0.0200**" in table[4]
    assert as_records([clear])[0] == {
        "measure": "ndcg@10", "system": "srpo", "against": "sft", "difference": 0.02, "low": 0.01, "high": 0.03
    }  # fmt: skip
