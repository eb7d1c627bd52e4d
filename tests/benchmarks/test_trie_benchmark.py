from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import trie as benchmark
from item_index.trie import ItemTrie


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few calls per subject; without llguidance, whose grammar takes seconds to compile."""
    monkeypatch.setattr(benchmark, "SECONDS_PER_CASE", 0.0)
    monkeypatch.setattr(benchmark, "FEWEST", 2)
    monkeypatch.setattr(benchmark, "LARGEST_GUIDANCE", 0)


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_catalogues_hold_distinct_items(distribution: str) -> None:
    codes = benchmark.catalogue_codes(3000, distribution)
    assert codes.shape == (3000, 4)
    assert len(np.unique(codes, axis=0)) == 3000
    share_of_first = (codes == 0).mean()
    assert (share_of_first > 0.05) == (distribution == "zipf")


def test_a_batch_has_prefixes_of_items_at_every_level() -> None:
    trie = ItemTrie.build(benchmark.catalogue_codes(3000, "uniform"))
    nodes = benchmark.batch_nodes(trie, 16)
    assert trie.level(nodes).tolist() == [0, 1, 2, 3] * 4
    assert (trie.child_count(nodes) > 0).all()


@pytest.mark.usefixtures("quick")
def test_every_subject_samples_items_and_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "trie.json"
    arguments = ["--items", "2000", "--batch", "8", "--vocabulary", "1100", "--json", str(file)]
    result = CliRunner().invoke(benchmark.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(file.read_text())["rows"]
    steps = {(row["case"], row["subject"]) for row in rows if row["metric"] == "step, median"}
    cases = [f"2,000 items, {name}, batch 8, vocabulary 1,100" for name in ("uniform", "zipf")]
    subjects = ["unconstrained", "dense mask", "padded CSR", "prefix dict", "ours"]
    assert steps == {(case, subject) for case in cases for subject in subjects}
    assert {row["unit"] for row in rows} == {"ms", "s", "ns", "bytes/item"}


def test_a_subject_that_samples_no_item_is_caught() -> None:
    import torch

    trie = ItemTrie.build(np.array([[0, 0, 0, 0], [1, 2, 3, 4]]))
    tokens = [level * 256 + np.arange(256) for level in range(4)]
    benchmark.check("x", trie, np.array([0, 0]), torch.tensor([0, 1]), tokens)
    with pytest.raises(RuntimeError, match="token 2 leads to no item in 1 rows"):
        benchmark.check("x", trie, np.array([0, 0]), torch.tensor([0, 2]), tokens)
