"""`gream run` on the least that the Parquet schema allows: no categories, no descriptions, titles in any script."""

import json

import numpy as np
import pytest
from small_tables import HISTORY, ITEMS, USERS, write_tables
from typer.testing import CliRunner

from cluster.cli import app

TITLES = [
    "Ночь над Невой",
    "七人の侍",
    "L’été à Brême",
    "Ἰλιάς",
    "ألف ليلة",
    "Ünïcødé №",
    "🎬 Reel",
    'A "quoted" | <b>',
]


@pytest.mark.engines
@pytest.mark.timeout(900)
def test_titles_and_ids_alone_are_enough(tmp_path, ray_cluster):
    generator = np.random.default_rng(7)
    ids = [f"артикул/{row}" for row in range(ITEMS)]
    pairs = [
        (f"käufer-{user:02}", ids[item]) for user in range(USERS) for item in generator.permutation(ITEMS)[:HISTORY]
    ]
    tables = {
        "items": {"item_id": ids, "title": [f"{TITLES[row % len(TITLES)]} {row}" for row in range(ITEMS)]},
        "interactions": {
            "user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs],
            "timestamp": [1_700_000_000 + 86_400 * (row % HISTORY // 4) for row in range(len(pairs))],  # by the day
        },
    }  # fmt: skip
    overrides = [
        *write_tables(tmp_path / "data", **tables), f"run_folder={tmp_path / 'run'}", "sft.passes=1",
        "train.steps=1", "train.prompts_per_step=4", "train.mini_batch_prompts=2", "train.responses=6",
        "train.reasoning_budget=64", "train.probe_prompts=2", "evaluation.chains=1", "cluster.kv_cache_mib=32",
        "cluster.rollout_sequences=32",
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["run", *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    for mode in ("direct", "reasoning"):
        assert results[f"{mode}_srpo"]["valid_rate"] == 1.0
    examples = (tmp_path / "run" / "evaluation" / "examples.md").read_text()
    assert any(title in examples for title in TITLES[:5])
