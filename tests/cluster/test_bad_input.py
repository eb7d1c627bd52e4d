"""`gream` with bad input: exit status 2 and one message that names file, row and field, before any engine starts."""

import json
import subprocess
import sys

import pytest
import ray
from small_tables import interactions_table, items_table, write_tables
from tiny import TEXTS, make_index

from cluster.cli import main
from cluster.pipeline import STAGES, run_stages, stage_inputs
from cluster.settings import load_settings
from curriculum.tokenizer import train_tokenizer
from learner.policy import build_language_model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """One run folder for all tests, because its tracking database takes seconds to make."""
    return tmp_path_factory.mktemp("bad_input") / "run"


@pytest.fixture
def gream(run_folder, monkeypatch, capsys):
    """Run `gream` with arguments; returns its exit status and what it wrote to stderr."""

    def no_ray(*_, **__):
        pytest.fail("Ray was started before the input was checked")

    monkeypatch.setattr(ray, "init", no_ray)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gream", *arguments, f"run_folder={run_folder}"])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return call


def expect_one_message(result, *parts):
    code, message = result
    assert code == 2
    assert message.startswith("gream: ")
    assert message.count("gream: ") == 1
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message


def changed(table, column, row, value):
    table[column][row] = value
    return table


def without(table, column):
    del table[column]
    return table


ITEM_FAULTS = {
    "missing column": (without(items_table(), "title"), ("field 'title'", "the column is missing")),
    "null item id": (changed(items_table(), "item_id", 3, None), ("row 3", "field 'item_id'", "null")),
    "repeated item id": (
        changed(items_table(), "item_id", 7, "item-2"),
        ("row 7", "field 'item_id'", "'item-2'", "row 2"),
    ),
    "blank title": (changed(items_table(), "title", 5, " "), ("row 5", "field 'title'", "empty")),
    "no rows": ({name: [] for name in items_table()}, ("no rows",)),
}
INTERACTION_FAULTS = {
    "missing column": (without(interactions_table(), "timestamp"), ("field 'timestamp'", "the column is missing")),
    "null user": (changed(interactions_table(), "user_id", 4, None), ("row 4", "field 'user_id'", "null")),
    "null item": (changed(interactions_table(), "item_id", 6, None), ("row 6", "field 'item_id'", "null")),
    "unknown item": (
        changed(interactions_table(), "item_id", 9, "item-99"),
        ("row 9", "field 'item_id'", "item 'item-99' is not in the catalogue"),
    ),
    "unparsable time": (
        changed({**interactions_table(), "timestamp": ["2024-05-01"] * 288}, "timestamp", 8, "yesterday"),
        ("row 8", "field 'timestamp'", "unparsable time 'yesterday'"),
    ),
    "null time": (changed(interactions_table(), "timestamp", 2, None), ("row 2", "field 'timestamp'", "null")),
    "no rows": ({name: [] for name in interactions_table()}, ("no rows",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", ITEM_FAULTS)
def test_a_fault_in_the_items(gream, tmp_path, fault):
    table, parts = ITEM_FAULTS[fault]
    overrides = write_tables(tmp_path, items=table)
    expect_one_message(gream("index", *overrides), str(tmp_path / "items.parquet"), *parts)


@pytest.mark.parametrize("fault", INTERACTION_FAULTS)
def test_a_fault_in_the_interactions(gream, tmp_path, fault):
    table, parts = INTERACTION_FAULTS[fault]
    overrides = write_tables(tmp_path, interactions=table)
    expect_one_message(gream("index", *overrides), str(tmp_path / "interactions.parquet"), *parts)


def test_a_file_that_is_empty_or_not_parquet_or_missing(gream, tmp_path):
    overrides = write_tables(tmp_path)
    file = tmp_path / "items.parquet"
    file.write_bytes(b"")
    expect_one_message(gream("index", *overrides), str(file), "not readable as Parquet")
    file.write_text("item_id,title\n1,Tale\n")
    expect_one_message(gream("index", *overrides), str(file), "not readable as Parquet")
    file.unlink()
    expect_one_message(gream("index", *overrides), str(file), "does not exist", "data.items")


def test_fewer_items_than_codes(gream, tmp_path):
    overrides = write_tables(tmp_path)
    expect_one_message(
        gream("index", *overrides, "index.level_sizes=[4,256]"),
        str(tmp_path / "items.parquet"), "field 'index.level_sizes'", "24 items are fewer than the 256 codes",
    )  # fmt: skip


def test_fewer_interactions_than_are_needed(gream, tmp_path):
    overrides = write_tables(tmp_path)
    expect_one_message(
        gream("index", *overrides, "data.minimum_interactions=25"), "field 'minimum_interactions'", "none of 288"
    )


def test_a_key_that_does_not_exist_in_an_override_or_in_the_file(gream, tmp_path):
    expect_one_message(gream("index", "index.level_size=[4]"), "'index.level_size'", "'index.level_sizes'")
    config = tmp_path / "config.yaml"
    config.write_text("train:\n  step: 3\n")
    expect_one_message(gream("run", "--config", str(config)), str(config), "'train.step'", "'train.steps'")
    expect_one_message(gream("index", "--config", str(tmp_path / "none.yaml")), "none.yaml", "does not exist")


def test_a_stage_whose_inputs_are_missing(gream, tmp_path):
    overrides = write_tables(tmp_path)
    expect_one_message(gream("train", *overrides), "the sft stage is missing", "Run `gream sft`")


@pytest.fixture(scope="module")
def with_corpus(run_folder, tmp_path_factory):
    """Overrides of a run whose index and corpus stages are done."""
    overrides = write_tables(tmp_path_factory.mktemp("tables"))
    run_stages(load_settings(None, [*overrides, f"run_folder={run_folder}"]), ["index", "corpus"])
    return overrides


def mark_sft_done(run_folder, overrides):
    settings = load_settings(None, [*overrides, f"run_folder={run_folder}"])
    folder = settings.folder / STAGES["sft"].folder
    folder.mkdir(exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"inputs": stage_inputs(settings, "sft")}))
    return folder / "checkpoint"


def test_train_on_a_stage_of_other_settings_names_what_changed(gream, with_corpus, run_folder):
    mark_sft_done(run_folder, with_corpus)
    for override, changed in (("sft.passes=9", "sft"), ("corpus.minimum_history=5", "the corpus stage")):
        expected = f"the sft stage was made with something else: {changed} changed since"
        expect_one_message(gream("train", *with_corpus, override), expected, "Run `gream sft`")


def test_train_with_a_checkpoint_that_lacks_the_indexs_tokens(gream, with_corpus, run_folder):
    checkpoint = mark_sft_done(run_folder, with_corpus)
    tokenizer = train_tokenizer(TEXTS, make_index(items=6, level_sizes=(2, 2)), vocabulary_size=300)
    build_language_model(tokenizer, hidden_size=32, layers=1, intermediate_size=32, seed=0).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    expect_one_message(
        gream("train", *with_corpus), str(checkpoint), "the tokenizer lacks", "tokens of index", "run corpus and sft"
    )


def test_train_without_a_checkpoint(gream, with_corpus, run_folder, tmp_path):
    checkpoint = mark_sft_done(run_folder, with_corpus)
    if checkpoint.exists():
        checkpoint.rename(tmp_path / "moved")
    expect_one_message(gream("train", *with_corpus), str(checkpoint), "there is no checkpoint")


def test_a_checkpoint_to_start_from_that_does_not_exist(gream, with_corpus, tmp_path):
    expect_one_message(
        gream("corpus", *with_corpus, f"model.checkpoint={tmp_path / 'nowhere'}"),
        str(tmp_path / "nowhere"), "field 'model.checkpoint'", "no such checkpoint folder",
    )  # fmt: skip


def test_the_command_itself_ends_with_status_2_and_one_line():
    ended = subprocess.run(
        [sys.executable, "-c", "from cluster.cli import main; main()", "run", "train.stepz=1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "gream: there is no key 'train.stepz'; the nearest one is 'train.steps'. "
        "See `gream run --dry-run` for all keys."
    ]


def test_checking_settings_and_data_imports_no_ray():
    code = "import sys, cluster.cli, cluster.pipeline; sys.exit(bool({'ray', 'vllm', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0
