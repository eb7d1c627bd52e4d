"""Bad input ends with exit status 2 and one message that names the place, before anything heavy starts."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tiny import TEXTS, make_index

from cluster import cli
from cluster.pipeline import STAGES, fingerprint, is_current, read_data, run_stages
from cluster.settings import load_settings
from curriculum.tokenizer import train_tokenizer
from item_index.semantic_ids import SemanticIdIndex

ITEMS = {"item_id": [f"i{row}" for row in range(8)], "title": [f"Title {row}" for row in range(8)]}
INTERACTIONS = {
    "user_id": [user for user in range(6) for _ in range(6)],
    "item_id": [f"i{(user + place) % 8}" for user in range(6) for place in range(6)],
    "timestamp": list(range(36)),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Write the two tables (changed as asked) and run `gream`; returns what it printed as its error."""

    def write(items=None, interactions=None):
        for name, table in (("items", items or ITEMS), ("interactions", interactions or INTERACTIONS)):
            pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")

    def call(command="index", *overrides, items=None, interactions=None):
        write(items, interactions)
        arguments = [
            "gream", command, f"run_folder={tmp_path / 'run'}", f"data.items={tmp_path / 'items.parquet'}",
            f"data.interactions={tmp_path / 'interactions.parquet'}", "data.minimum_interactions=3",
            "index.level_sizes=[2,2]", *overrides,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", arguments)
        ray_before = ray.is_initialized()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert ray.is_initialized() == ray_before
        return capsys.readouterr().err

    call.write = write
    call.folder = tmp_path
    return call


def replaced(table, column, place, value):
    changed = {name: list(values) for name, values in table.items()}
    changed[column][place] = value
    return changed


def without(table, column):
    return {name: values for name, values in table.items() if name != column}


@pytest.mark.parametrize(
    ("items", "interactions", "named"),
    [
        (without(ITEMS, "title"), None, ["items.parquet", "title"]),
        (replaced(ITEMS, "item_id", 3, None), None, ["items.parquet", "row 3", "item_id"]),
        (replaced(ITEMS, "item_id", 3, "i1"), None, ["items.parquet", "row 3", "item_id", "i1"]),
        (
            {"item_id": pa.array([], pa.string()), "title": pa.array([], pa.string())},
            None,
            ["items.parquet", "no rows"],
        ),
        (None, without(INTERACTIONS, "timestamp"), ["interactions.parquet", "timestamp"]),
        (None, replaced(INTERACTIONS, "item_id", 5, "nowhere"), ["interactions.parquet", "row 5", "nowhere"]),
        (
            None,
            {**INTERACTIONS, "timestamp": ["2020-01-01"] * 7 + ["last week"] + ["2020-01-02"] * 28},
            ["interactions.parquet", "row 7", "timestamp", "last week"],
        ),
    ],
)
def test_a_bad_table_is_named_with_row_and_field(run, items, interactions, named):
    message = run(items=items, interactions=interactions)
    for part in named:
        assert part in message
    assert message.startswith("gream: ")
    assert message.count("\n") == 1


def test_fewer_items_than_codes(run):
    message = run("index", "index.level_sizes=[2,64]")
    assert "8 items are fewer than the 64 codes" in message
    assert "index.level_sizes" in message


def test_an_unknown_key_and_a_missing_file(run):
    assert "the nearest one is 'train.steps'" in run("train", "train.stesp=3")
    assert "nowhere.parquet" in run("run", "data.items=nowhere.parquet")


def test_a_stage_without_the_ones_before_it_says_what_to_run(run):
    assert "Run `gream sft`" in run("train")


def test_a_checkpoint_without_the_tokens_of_the_index(run):
    run.write()
    folder = run.folder / "run"
    settings = load_settings(
        None,
        [
            f"run_folder={folder}", f"data.items={run.folder / 'items.parquet'}",
            f"data.interactions={run.folder / 'interactions.parquet'}", "data.minimum_interactions=3",
            "index.level_sizes=[2,2]",
        ],
    )  # fmt: skip
    run_stages(settings, ["index", "corpus"])
    checkpoint = folder / "sft" / "checkpoint"
    checkpoint.mkdir(parents=True)
    other = train_tokenizer(TEXTS, make_index(), vocabulary_size=300)
    other.add_tokens(["<|unused|>"])
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if not t["content"].startswith("<|b_")]
    other.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text(json.dumps(vocabulary))
    (folder / "sft" / "stage.json").write_text(json.dumps({"fingerprint": fingerprint(settings, "sft")}))
    message = run("train")
    assert "tokenizer lacks" in message
    assert SemanticIdIndex.load(folder / "index").version in message
    assert "checkpoint" in message


def test_the_same_seed_gives_the_same_split_and_index_and_changes_are_noticed(run):
    run.write()
    common = [
        f"data.items={run.folder / 'items.parquet'}", f"data.interactions={run.folder / 'interactions.parquet'}",
        "data.minimum_interactions=3", "index.level_sizes=[2,2]",
    ]  # fmt: skip
    versions, splits = [], []
    for name in ("first", "second"):
        settings = load_settings(None, [*common, f"run_folder={run.folder / name}"])
        run_stages(settings, ["index", "corpus"])
        versions.append(SemanticIdIndex.load(settings.folder / "index").version)
        splits.append(json.loads((settings.folder / "corpus" / "summary.json").read_text())["split_fingerprint"])
    assert versions[0] == versions[1]
    assert splits[0] == splits[1] == read_data(settings)[1].fingerprint()

    assert is_current(settings, "index")
    assert is_current(settings, "corpus")
    assert not is_current(settings, "sft")
    changed = load_settings(None, [*common, f"run_folder={settings.folder}", "corpus.history_items=3"])
    assert is_current(changed, "index")
    assert not is_current(changed, "corpus")
    run.write(items=replaced(ITEMS, "title", 0, "Another title"))
    assert not any(is_current(settings, name) for name in STAGES)


def test_a_dry_run_prints_settings_that_load(run):
    printed = subprocess.run(
        [f"{sys.prefix}/bin/gream", "run", "--dry-run", "train.steps=3"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    (run.folder / "printed.yaml").write_text(printed)
    assert load_settings(run.folder / "printed.yaml").train.steps == 3
