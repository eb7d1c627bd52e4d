"""A small run folder whose supervised stage is done, for benchmarks of the train stage on one machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.pipeline import run_stages
from cluster.settings import load_settings

ITEMS, USERS, HISTORY = 60, 60, 12


def prepared(folder: Path, steps: int) -> tuple[Path, list[str]]:
    """A run folder whose supervised stage is done, and its settings."""
    generator = np.random.default_rng(0)
    items = [f"item-{row}" for row in range(ITEMS)]
    pairs = [(user, items[row]) for user in range(USERS) for row in generator.permutation(ITEMS)[:HISTORY]]
    tables = {
        "items": {"item_id": items, "title": [f"Tale number {row}" for row in range(ITEMS)],
                  "categories": [[f"kind {row % 4}"] for row in range(ITEMS)]},
        "interactions": {"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs],
                         "timestamp": [place % HISTORY for place in range(len(pairs))]},
    }  # fmt: skip
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    overrides = [
        f"data.items={folder}/items.parquet", f"data.interactions={folder}/interactions.parquet",
        "index.level_sizes=[4,4]", "corpus.reasoning_rows=60", "sft.passes=1", "sft.batch_rows=32",
        "sft.learning_rate=1.0e-3",
        f"train.steps={steps}", "train.prompts_per_step=8", "train.mini_batch_prompts=4", "train.responses=6",
        "train.learning_rate=1.0e-4", "train.reasoning_budget=48", "train.probe_prompts=8", "train.checkpoint_steps=2",
        "train.dump_rollouts=true", "train.reasoning_share=0.25", "cluster.threads=1", "cluster.kv_cache_mib=64",
        "cluster.reward_cpus=1",
    ]  # fmt: skip
    run = folder / "prepared"
    run_stages(load_settings(None, [*overrides, f"run_folder={run}"]), ["index", "corpus", "sft"])
    return run, overrides
