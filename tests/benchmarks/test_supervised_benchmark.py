"""What the benchmark of supervised training counts, on a model of a few weights."""

import json
import subprocess

import pytest

from benchmarks.random_model import write_random_model
from benchmarks.supervised import UNITS
from benchmarks.supervised_subjects import SUBJECTS, WARM_UP_STEPS, Task, command, supervised_rows

TASK = Task("ours", "", vocabulary=100, steps=2, rows_per_step=6)


def test_rows_are_the_same_for_every_subject_and_learn_their_response_alone():
    tokens, learnt = supervised_rows(TASK)
    again, _ = supervised_rows(TASK)
    assert tokens.values.tolist() == again.values.tolist()
    assert len(tokens) == (WARM_UP_STEPS + TASK.steps) * TASK.rows_per_step
    for row in learnt:
        response = int(row.sum())
        assert 5 <= response < len(row)
        assert row[-response:].all()


@pytest.mark.engines
def test_ours_counts_the_tokens_of_its_steps(tmp_path):
    write_random_model(
        tmp_path, TASK.vocabulary, hidden_size=128, num_hidden_layers=2, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    done = subprocess.run(
        command(Task(**{**vars(TASK), "model": str(tmp_path)})), capture_output=True, text=True, timeout=280, check=True
    )
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert list(numbers) == list(UNITS)
    lengths = supervised_rows(TASK)[0].lengths
    assert numbers["tokens"] == lengths[WARM_UP_STEPS * TASK.rows_per_step :].sum()
    assert 0 < numbers["slowest step"] <= numbers["tokens per second"] <= numbers["fastest step"]
    assert set(SUBJECTS) == {"ours", "TRL, padded", "TRL, packed"}
