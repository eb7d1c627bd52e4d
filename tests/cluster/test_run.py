"""`gream run` from Parquet to results on the real engines, with a catalogue of 24 items and a model of a few thousand
weights: what it checks is that the stages fit together, not that anything is learnt."""

import json
import sqlite3

import pytest
from small_tables import write_tables

from cluster.pipeline import STAGES, run_stages
from cluster.settings import load_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster):
    """Settings of one small run folder, with overrides."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        *write_tables(folder / "data"), f"run_folder={folder / 'run'}", "sft.passes=2", "sft.learning_rate=1.0e-3",
        "train.steps=2", "train.prompts_per_step=6", "train.mini_batch_prompts=3", "train.responses=6",
        "train.reasoning_budget=64", "train.probe_prompts=4", "train.learning_rate=1.0e-4", "evaluation.chains=2",
        "cluster.kv_cache_mib=32", "cluster.rollout_sequences=32",
    ]  # fmt: skip
    return lambda *more: load_settings(None, [*overrides, *more])


@pytest.mark.engines
@pytest.mark.timeout(900)
def test_all_stages_run_and_a_second_run_reuses_them(run, capsys):
    settings = run()
    run_stages(settings, list(STAGES))
    capsys.readouterr()

    results = json.loads((settings.folder / "evaluation" / "results.json").read_text())
    assert set(results) == {
        "popularity", "markov", "item_knn", "direct_sft", "direct_srpo", "reasoning_sft", "reasoning_srpo",
    }  # fmt: skip
    for values in results.values():
        assert values["valid_rate"] == 1.0
        assert {"recall@10", "ndcg@10"} <= set(values)
    summary = json.loads((settings.folder / "corpus" / "summary.json").read_text())
    for stage in ("sft", "srpo"):  # the same figures for the teacher's chains and for the models'
        figures = {name.removeprefix("chains/") for name in results[f"reasoning_{stage}"] if name.startswith("chains/")}
        assert set(summary["chains"]) - {"foreign_share"} <= figures
    probe = json.loads((settings.folder / "train" / "probe.json").read_text())
    assert set(probe) == {"direct", "reasoning", "both modes"}
    assert probe["direct"]["valid_rate"] == probe["reasoning"]["valid_rate"] == 1.0

    database = sqlite3.connect(settings.folder / "mlflow.db")
    runs = dict(database.execute("select name, status from runs"))
    assert runs == {f"run/{name}": "FINISHED" for name in STAGES}
    steps = database.execute(
        "select step, value from metrics where key = 'train/weight_version' order by step"
    ).fetchall()
    assert steps == [(1, 1.0), (2, 2.0)]
    valid = database.execute("select value from metrics where key = 'train/valid_rate'").fetchall()
    assert valid == [(1.0,), (1.0,)]
    lengths = database.execute("select value from metrics where key = 'train/chains/think_tokens'").fetchall()
    assert len(lengths) == 2
    parameters = dict(database.execute("select key, value from params"))
    assert parameters["train.responses"] == "6"

    run_stages(settings, list(STAGES))
    printed = capsys.readouterr().out
    for name in STAGES:
        assert f"{name}: unchanged, re-used" in printed

    # The supervised checkpoint alone does not need the train stage, so that one's changed settings do not matter.
    only = run("evaluation.checkpoints=[sft]", "evaluation.modes=[direct]", "train.steps=9")
    run_stages(only, ["evaluate"])
    alone = json.loads((settings.folder / "evaluation" / "results.json").read_text())
    assert set(alone) == {"popularity", "markov", "item_knn", "direct_sft"}
    assert alone["direct_sft"] == results["direct_sft"]
    assert "- a chain:" not in (settings.folder / "evaluation" / "examples.md").read_text()
