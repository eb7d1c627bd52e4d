"""The learner's benchmark: its subjects do the same work, and the table says what each reached."""

import io

import pytest
from rich.console import Console

from benchmarks.child_process import Outcome
from benchmarks.learner import needed_operations, report_table
from benchmarks.learner_subjects import Task, measure, random_groups
from benchmarks.random_model import write_random_model

VOCABULARY = 1100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_random_model(
        path, VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return str(path)


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_packed_and_padded_groups_have_one_loss_and_gradient(folder, mode):
    packed, padded = (measure(Task(subject, folder, VOCABULARY, mode, 2, 1)) for subject in ("ours", "ours, padded"))
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["gradient norm"] == pytest.approx(padded["gradient norm"], rel=1e-4)
    assert packed["gradient norm"] > 0


def test_the_floor_counts_every_token_once_and_the_head_where_a_token_is_predicted(folder):
    task = Task("ours", folder, VOCABULARY, "direct", 3, 1)
    listed = 3 * 16 * (256 + 256 + 16 + 1 + 1)
    assert needed_operations(task, 1000, 32) == 6 * (3 * (200 + 16 * 4) * 1000 + listed * 32)
    longer = Task("ours", folder, VOCABULARY, "reasoning", 1, 1)
    groups = random_groups(longer, 0)
    text = sum(len(response) - 5 for response in groups.responses)
    assert needed_operations(longer, 0, 32) == 6 * (text * VOCABULARY * 32 + 10 * (256 + 256 + 16 + 1 + 1) * 32)


def test_the_table_compares_with_the_first_subject():
    numbers = {"groups per second": 8.0, "slowest": 7.0, "fastest": 9.0, "peak memory": 64.0, "gradient norm": 1.5}
    outcomes = [
        Outcome("ours", numbers), Outcome("TRL", {**numbers, "groups per second": 2.0}),
        Outcome("other", {}, problem="not installed: pip install other"),
    ]  # fmt: skip
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report_table("case", outcomes, 0.05))
    text = console.export_text()
    assert "40%" in text
    assert "10%" in text
    assert "4.00" in text
    assert "not installed: pip install other" in text
