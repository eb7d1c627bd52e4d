"""The step benchmark: our subject does the work that is asked for, and the table says what each reached."""

import io

import pytest
from rich.console import Console

from benchmarks.child_process import Outcome
from benchmarks.random_model import write_item_model
from benchmarks.rollouts import random_index
from benchmarks.step import report_table, rest_share
from benchmarks.step_subjects import PHASES, Task, hash_reward, measure

NUMBERS = {
    "rollouts": 2.0, "rewards": 0.25, "learner": 1.0, "weights": 0.25, "step": 4.0, "engine": 1.9, "trained": 32.0,
    "tokens": 160.0, "valid": 1.0, "responses per second": 8.0,
}  # fmt: skip


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_our_subject_trains_on_every_response_and_its_phases_make_up_the_step(tmp_path, ray_cluster):
    index = random_index(50, codes=8)
    index.save(tmp_path / "index")
    write_item_model(
        tmp_path / "model", index, 2700, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    numbers = measure(Task("ours", str(tmp_path / "model"), str(tmp_path / "index"), 3, 4, 20, 5, 2))
    assert numbers["trained"] == 12
    assert numbers["tokens"] == 60
    assert numbers["valid"] == 1.0
    assert sum(numbers[phase] for phase in PHASES) <= numbers["step"] * 1.01
    assert numbers["engine"] <= numbers["rollouts"]


def test_rewards_by_hash_differ_and_are_the_same_every_time():
    values = [hash_reward([number, 5]) for number in range(20)]
    assert len(set(values)) == 20
    assert values == [hash_reward([number, 5]) for number in range(20)]
    assert all(0 <= value < 1 for value in values)


def test_the_table_compares_with_the_first_subject():
    assert rest_share(NUMBERS) == 0.25
    outcomes = [
        Outcome("ours", NUMBERS), Outcome("TRL", {**NUMBERS, "responses per second": 2.0}),
        Outcome("other", {}, problem="not installed: pip install other"),
    ]  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_table("case", outcomes))
    text = console.export_text()
    assert "4.00" in text
    assert "25.0%" in text
    assert "0.500" in text, "everything else"
    assert "not installed: pip install other" in text
