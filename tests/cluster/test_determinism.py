"""The same input, settings and seed give the same split and index; a stage runs again where its inputs changed."""

import json

import pytest
from small_tables import interactions_table, items_table, write_tables

from cluster.pipeline import (
    STAGES,
    changed_inputs,
    equal_time_steps,
    fingerprint,
    is_current,
    read_data,
    run_stages,
    stage_inputs,
    stages_of,
)
from cluster.settings import load_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings of one small run folder, with overrides."""
    folder = tmp_path_factory.mktemp("determinism")
    overrides = [*write_tables(folder / "data"), f"run_folder={folder / 'run'}"]
    return lambda *more: load_settings(None, [*overrides, *more])


def made(settings):
    """What the index and corpus stages say of their output, and their files byte by byte."""
    run_stages(settings, ["index", "corpus"])
    summaries = [
        json.loads((settings.folder / name / "stage.json").read_text())["summary"] for name in ("index", "corpus")
    ]
    version = summaries[0]["version"]
    earlier = {path for path in (settings.folder / "index" / "versions").iterdir() if path.name != version}
    files = {
        str(file.relative_to(settings.folder)).replace(version, "VERSION"): file.read_bytes()
        for name in ("index", "corpus")
        for file in sorted((settings.folder / name).rglob("*"))
        if file.is_file() and file.name != "stage.json" and not earlier & set(file.parents)
    }
    return version, summaries[1]["split_fingerprint"], files


def test_a_seed_fixes_split_and_index_and_another_seed_gives_others(run):
    version, split, files = made(run())
    other_version, other_split, other_files = made(run("seed=1"))
    assert other_version != version
    assert other_split != split
    assert other_files.keys() == files.keys()
    assert made(run()) == (version, split, files)


def test_the_order_of_rows_in_the_files_does_not_show(run, tmp_path):
    backwards = {name: values[::-1] for name, values in interactions_table().items()}
    overrides = write_tables(tmp_path, interactions=backwards)
    fingerprints = {read_data(settings)[1].fingerprint() for settings in (run(), load_settings(None, overrides))}
    assert len(fingerprints) == 1


def test_a_finished_stage_is_current_until_something_it_depends_on_changes(run):
    settings = run()
    run_stages(settings, ["index", "corpus"])
    assert is_current(settings, "index")
    assert is_current(settings, "corpus")
    assert not is_current(settings, "sft")
    # What a stage does not read does not matter to it.
    for override in ("train.steps=3", "sft.passes=9", "cluster.threads=1", "tracking.experiment=other"):
        assert is_current(run(override), "corpus"), override
    assert is_current(run("corpus.rl_holdout=0.2"), "index")
    assert not is_current(run("corpus.rl_holdout=0.2"), "corpus")
    # What an earlier stage reads matters to all after it.
    for override in ("seed=1", "index.level_sizes=[4,2,2]", "data.minimum_interactions=4"):
        assert not is_current(run(override), "index"), override
        assert not is_current(run(override), "corpus"), override


def test_a_changed_data_file_makes_every_stage_stale(tmp_path):
    settings = load_settings(None, [*write_tables(tmp_path / "data"), f"run_folder={tmp_path / 'run'}"])
    before = {name: fingerprint(settings, name) for name in STAGES}
    folder = settings.folder / "index"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"inputs": stage_inputs(settings, "index")}))
    assert is_current(settings, "index")

    items = items_table()
    items["title"][5] = "Tale with another name"
    write_tables(tmp_path / "data", items=items)
    assert changed_inputs(settings, "index") == ["data.items"]
    after = {name: fingerprint(settings, name) for name in STAGES}
    assert all(before[name] != after[name] for name in STAGES)

    write_tables(tmp_path / "data")
    assert is_current(settings, "index"), "the same bytes again"
    moved = [f"run_folder={tmp_path / 'run'}", *write_tables(tmp_path / "elsewhere")]
    assert is_current(load_settings(None, moved), "index"), "the same bytes at another place"


def test_the_fingerprint_of_a_stage_follows_its_own_settings(run):
    every = "evaluation.checkpoints=[sft, sft_continued, srpo]"
    own = {
        "index": "index.balanced=true", "corpus": "corpus.minimum_history=5", "sft": "model.layers=2",
        "train": "train.objective.clip_high=0.3", "sft_continued": "sft_continued.steps=5",
        "evaluate": "evaluation.chains=2",
    }  # fmt: skip
    assert own.keys() == STAGES.keys()
    order = list(STAGES)
    for name, override in own.items():
        for other in STAGES:
            changed = fingerprint(run(every, override), other) != fingerprint(run(every), other)
            assert changed == (order.index(other) >= order.index(name)), (override, other)


def test_an_evaluation_of_the_supervised_checkpoint_alone_does_not_depend_on_the_train_stage(run):
    alone = "evaluation.checkpoints=[sft]"
    assert fingerprint(run(alone, "train.steps=7"), "evaluate") == fingerprint(run(alone), "evaluate")
    assert fingerprint(run(alone, "sft.passes=7"), "evaluate") != fingerprint(run(alone), "evaluate")


def test_a_run_has_the_stages_that_its_evaluated_checkpoints_need(run):
    assert stages_of(run()) == ["index", "corpus", "sft", "train", "evaluate"]
    assert stages_of(run("evaluation.checkpoints=[srpo]")) == ["index", "corpus", "sft", "train", "evaluate"]
    assert stages_of(run("evaluation.checkpoints=[sft]")) == ["index", "corpus", "sft", "evaluate"]
    assert stages_of(run("evaluation.checkpoints=[sft_continued]")) == list(STAGES)
    assert fingerprint(run("sft_continued.steps=9"), "evaluate") == fingerprint(run(), "evaluate")


def test_supervised_training_goes_on_for_as_long_as_srpo_took():
    supervised = {"seconds": 99.0, "summary": {"steps": 200, "tokens": 80_000, "tokens_per_second": 1600.0}}
    assert equal_time_steps({"seconds": 120.0}, supervised) == 480  # 4 steps a second, start-up left out
    assert equal_time_steps({"seconds": 0.01}, supervised) == 1


def test_a_stage_that_failed_is_not_current(run, tmp_path):
    settings = load_settings(
        None, [*write_tables(tmp_path), f"run_folder={run().run_folder}", "corpus.history_items=5"]
    )
    run_stages(settings, ["index"])
    run_stages(settings, ["corpus"])
    broken = load_settings(
        None,
        [*write_tables(tmp_path), f"run_folder={run().run_folder}", f"model.checkpoint={tmp_path / 'nowhere'}"],
    )
    with pytest.raises(ValueError, match="nowhere"):
        run_stages(broken, ["corpus"])
    assert not is_current(settings, "corpus")
    assert not is_current(broken, "corpus")
