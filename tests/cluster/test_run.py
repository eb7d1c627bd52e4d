"""`gream run` from Parquet to results on the real engines, with a catalogue of 24 items and a model of a few thousand
weights: what it checks is that the stages fit together, not that anything is learnt."""

import json
import sqlite3

import mlflow
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient
from small_tables import write_tables

from cluster.pipeline import STAGES, replay_rollouts, run_stages
from cluster.rollout_report import rollout_report
from cluster.run_report import write_report
from cluster.run_status import show_status
from cluster.settings import load_settings
from curriculum.corpus import load_corpus
from evaluation.chain_interventions import CHAIN_INTERVENTIONS
from item_index.constraint import MODES
from item_index.input_error import InputError
from learner.rollout_files import read_trained_groups


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster):
    """Settings of one small run folder, with overrides."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        *write_tables(folder / "data"), f"run_folder={folder / 'run'}", "sft.passes=2", "sft.learning_rate=1.0e-3",
        "train.steps=2", "train.prompts_per_step=6", "train.mini_batch_prompts=3", "train.responses=6",
        "train.reasoning_budget=64", "train.probe_prompts=4", "train.learning_rate=1.0e-4", "evaluation.chains=2",
        "cluster.kv_cache_mib=32", "cluster.rollout_sequences=32", "tracking.sample_steps=1",
    ]  # fmt: skip
    return lambda *more: load_settings(None, [*overrides, *more])


@pytest.mark.engines
@pytest.mark.timeout(900)
def test_all_stages_run_and_a_second_run_reuses_them(run, capsys):
    settings = run(
        "train.validation_steps=1", "train.result=best", "train.dump_rollouts=true", "evaluation.samples=5",
        "sft_continued.steps=3", "evaluation.checkpoints=[sft, sft_continued, srpo]", "train.warm_up_steps=1",
        "train.learning_rate_schedule=cosine",
        "train.rewards=[{reward: residual_sensitive}, {reward: collaborative, weight: 0.5}]",
        f"evaluation.interventions=[{', '.join(CHAIN_INTERVENTIONS)}]",
    )  # fmt: skip
    run_stages(settings, list(STAGES))
    capsys.readouterr()

    results = json.loads((settings.folder / "evaluation" / "results.json").read_text())
    assert set(results) == {
        "popularity", "markov", "item_knn", "direct_sft", "direct_sft_continued", "direct_srpo", "reasoning_sft",
        "reasoning_sft_continued", "reasoning_srpo",
        *(f"reasoning_srpo/{name}" for name in CHAIN_INTERVENTIONS),
    }  # fmt: skip
    assert {"pass@1", "pass@5"} <= set(results["reasoning_sft"])
    assert results["reasoning_sft"]["pass@1"] <= results["reasoning_sft"]["pass@5"]
    for values in results.values():
        assert values["valid_rate"] == 1.0
        assert {"recall@10", "ndcg@50", "entropy@10", "recall@10/warm"} <= set(values)
    compared = json.loads((settings.folder / "evaluation" / "comparisons.json").read_text())
    baselines = ["popularity", "markov", "item_knn"]
    assert list(dict.fromkeys((row["system"], row["against"]) for row in compared)) == [
        *(
            (f"{mode}_srpo", against)
            for mode in ("direct", "reasoning")
            for against in (f"{mode}_sft", f"{mode}_sft_continued", *baselines)
        ),
        *((f"reasoning_srpo/{name}", "reasoning_srpo") for name in CHAIN_INTERVENTIONS),
        ("reasoning_srpo/cited_items_removed", "reasoning_srpo/other_items_removed"),
    ]
    difference = results["direct_srpo"]["ndcg@10"] - results["direct_sft"]["ndcg@10"]
    (row,) = (row for row in compared if (row["measure"], row["against"]) == ("ndcg@10", "direct_sft"))
    assert row["difference"] == pytest.approx(difference)
    _, html = write_report([settings.folder], settings.folder / "report")  # reads rankings, metrics and curves
    assert html.read_text().count("data:image/png") >= 4
    summary = json.loads((settings.folder / "corpus" / "summary.json").read_text())
    for stage in ("sft", "sft_continued", "srpo"):  # the same figures for the teacher's chains and for the models'
        figures = {name.removeprefix("chains/") for name in results[f"reasoning_{stage}"] if name.startswith("chains/")}
        assert set(summary["chains"]) - {"foreign_share"} <= figures
    probe = json.loads((settings.folder / "train" / "probe.json").read_text())
    assert set(probe) == {"direct", "reasoning", "both modes"}
    assert probe["direct"]["valid_rate"] == probe["reasoning"]["valid_rate"] == 1.0

    best = json.loads((settings.folder / "train" / "best.json").read_text())
    assert best["mean_reward"] == pytest.approx((best["direct"] + best["reasoning"]) / 2)
    selected, kept = (settings.folder / "train" / name / "model.safetensors" for name in ("checkpoint", "best"))
    assert selected.read_bytes() == kept.read_bytes()

    database = sqlite3.connect(settings.folder / "mlflow.db")
    runs = dict(database.execute("select name, status from runs"))
    assert runs == {"run: gream run": "FINISHED", **{f"run/{name}": "FINISHED" for name in STAGES}}
    steps = database.execute(
        "select step, value from metrics where key = 'train/weight_version' order by step"
    ).fetchall()
    assert steps == [(1, 1.0), (2, 2.0)]
    valid = database.execute("select value from metrics where key = 'train/valid_rate'").fetchall()
    assert valid == [(1.0,), (1.0,)]
    sums = dict(database.execute("select key, sum(value) from metrics where key like 'train/reward%' group by key"))
    assert sums["train/rewards/collaborative"] > 0
    terms = sums["train/rewards/residual_sensitive"] + 0.5 * sums["train/rewards/collaborative"]
    assert sums["train/reward"] == pytest.approx(terms, rel=1e-5)
    rates = database.execute("select value from metrics where key = 'train/learner/learning_rate' order by step")
    first, last = (rate for (rate,) in rates)
    assert last < first  # two of four optimizer steps, and all four
    losses = database.execute("select step from metrics where key = 'sft_continued/loss' order by step").fetchall()
    assert losses == [(1,), (2,), (3,)]
    lengths = database.execute("select value from metrics where key = 'train/chains/think_tokens'").fetchall()
    assert len(lengths) == 2
    parameters = dict(database.execute("select key, value from params"))
    assert parameters["train.responses"] == "6"

    seconds = dict(
        database.execute("select key, sum(value) from metrics where key like 'train/seconds/%' group by key")
    )
    assert 0 < seconds["train/seconds/tracking"] < seconds["train/seconds/step"]
    versions = database.execute("select name from model_versions").fetchall()
    assert versions == [("gream-run",)] * 4, "supervised, last and best policy, supervised and continued"
    client = MlflowClient(f"sqlite:///{settings.folder / 'mlflow.db'}")
    for alias, stage in (("sft", "sft"), ("srpo", "train"), ("best", "train")):
        tags = client.get_model_version_by_alias("gream-run", alias).tags
        assert f"/run/{stage}/" in tags["gream.checkpoint"]
    mlflow.set_tracking_uri(f"sqlite:///{settings.folder / 'mlflow.db'}")  # load_table asks there
    (train,) = client.search_runs(["1"], "tags.`gream.stage` = 'train'")
    table = client.load_table("1", "samples/step-000002.json", [train.info.run_id])
    trained = read_trained_groups(settings.folder / "rollouts" / "step-000002.parquet").batch.prompts
    modes = {MODES[flag] for flag in trained.reasoning.astype(int)}  # a mode without variance has no group in a step
    assert set(table["mode"]) == modes
    assert len(table) == len(modes) * 6
    assert all("[Tale number" in response for response in table["response"])
    figures = {file.path for file in client.list_artifacts(train.info.run_id, "figures")}
    assert {"figures/reward.png", "figures/ratio.png", "figures/seconds.png"} <= figures
    show_status(settings.folder)
    status = capsys.readouterr().out
    assert "2/2" in status
    assert "tracking: MLflow has everything" in status
    assert status.count("FINISHED") == 1 + len(STAGES)

    run_stages(settings, list(STAGES))
    printed = capsys.readouterr().out
    for name in STAGES:
        assert f"{name}: unchanged, re-used" in printed

    # The supervised checkpoint alone does not need the train stage, so that one's changed settings do not matter.
    validated = database.execute("select step from metrics where key = 'validation/direct/reward'").fetchall()
    assert validated == [(1,), (2,)]
    only = run("evaluation.checkpoints=[sft]", "evaluation.modes=[direct]", "train.steps=9")
    run_stages(only, ["evaluate"])
    alone = json.loads((settings.folder / "evaluation" / "results.json").read_text())
    assert set(alone) == {"popularity", "markov", "item_knn", "direct_sft"}
    assert alone["direct_sft"] == results["direct_sft"]
    assert "- a chain:" not in (settings.folder / "evaluation" / "examples.md").read_text()


@pytest.mark.engines
@pytest.mark.timeout(900)
def test_a_replay_of_the_kept_rollouts_gives_the_same_policy_without_an_engine(run, capsys, monkeypatch):
    settings = run("train.dump_rollouts=true")
    run_stages(settings, ["index", "corpus", "sft", "train"])
    files = sorted((settings.folder / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000001.parquet", "step-000002.parquet"]

    # No engine is started: it could not be.
    monkeypatch.setattr("cluster.rollout_engines.RolloutActor", None)
    replay_rollouts(settings, settings.folder / "rollouts")
    trained, replayed = (
        safetensors.torch.load_file(settings.folder / stage / "checkpoint" / "model.safetensors")
        for stage in ("train", "replay")
    )
    before = safetensors.torch.load_file(settings.folder / "sft" / "checkpoint" / "model.safetensors")
    assert trained.keys() == replayed.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    for name in trained:
        assert torch.equal(trained[name], replayed[name]), name
    lines = [json.loads(line) for line in (settings.folder / "replay" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]

    corpus = load_corpus(settings.folder / "corpus", settings.folder / "index")
    report = rollout_report(files[0], corpus, groups=2, responses=4)
    groups = read_trained_groups(files[0])
    assert f"step 1: {len(groups.batch)} groups, 2 shown" in report
    assert f"true next item: {corpus.catalogue.titles[int(groups.batch.prompts.targets[0])]}" in report
    assert report.count("  advantage ") == 8
    best = groups.rewards[: groups.batch.group_sizes[0]].max()
    assert f"  reward {best:.3f}" in report
    assert corpus.index.text(0)[:4] not in report, "semantic IDs are shown as titles"

    with pytest.raises(InputError, match="holds no groups"):
        replay_rollouts(settings, settings.folder / "corpus")
