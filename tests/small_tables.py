"""Item and interaction tables small enough to index in a second, for tests that change a thing in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS, USERS, HISTORY = 24, 24, 12
KINDS = ["Drama", "Comedy", "Horror", "Western"]


def items_table() -> dict[str, list[Any]]:
    """Columns of items.parquet."""
    return {
        "item_id": [f"item-{row}" for row in range(ITEMS)],
        "title": [f"Tale number {row}" for row in range(ITEMS)],
        "categories": [[KINDS[row % 4], KINDS[(row // 4) % 4]] for row in range(ITEMS)],
    }


def interactions_table() -> dict[str, list[Any]]:
    """Columns of interactions.parquet; times come in ties of three, whose order the seed draws."""
    generator = np.random.default_rng(0)
    pairs = [(user, item) for user in range(USERS) for item in generator.permutation(ITEMS)[:HISTORY]]
    return {
        "user_id": [user for user, _ in pairs],
        "item_id": [f"item-{item}" for _, item in pairs],
        "timestamp": [row // 3 for row in range(len(pairs))],
    }


def write_tables(
    folder: Path, *, items: dict[str, list[Any]] | None = None, interactions: dict[str, list[Any]] | None = None
) -> list[str]:
    """Write both tables; returns the overrides that name them, with settings that fit their size."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(items or items_table()), folder / "items.parquet")
    pq.write_table(pa.table(interactions or interactions_table()), folder / "interactions.parquet")
    return [
        f"data.items={folder / 'items.parquet'}", f"data.interactions={folder / 'interactions.parquet'}",
        "data.minimum_interactions=3", "index.level_sizes=[4,3,2]", "corpus.history_items=6",
        "corpus.text_vocabulary=300", "model.hidden_size=32", "model.intermediate_size=32", "model.layers=1",
    ]  # fmt: skip
