"""The beam benchmark: the subjects rank the same items for the same prompts, and the table compares them."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.beam import quality, report_table, write_widened
from benchmarks.beam_subjects import SUBJECTS, ItemSpellings, Task, command, measure
from benchmarks.child_process import Outcome, run_child

NUMBERS = {
    "users per second": 8.0, "slowest": 7.0, "fastest": 9.0, "start": 1.0, "peak memory": 100.0, "valid places": 1.0,
    "recall": 0.5, "like ours": 1.0,
}  # fmt: skip


@pytest.fixture
def task(tiny, tmp_path):
    prompts = tiny.prompts(["direct"] * 5).tokens
    np.savez(tmp_path / "prompts.npz", tokens=prompts.values, ends=prompts.offsets[1:])

    def of(subject, *, model=tiny.checkpoint, width=4):
        return Task(
            subject, str(model), str(tiny.index_folder), str(tmp_path / "prompts.npz"), str(tmp_path / "ranked.npy"),
            width, 3, 1, 1,
        )  # fmt: skip

    return of


@pytest.mark.engines
@pytest.mark.timeout(300)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_ranks_the_same_items(task, tiny, tmp_path, subject):
    write_widened(tiny.checkpoint, tmp_path / "wide", 700)
    wide = task(subject, model=tmp_path / "wide")
    outcome = run_child(subject, command(wide), 200)  # vLLM's engine wants a process in which numba has not been loaded
    assert outcome.numbers.get("users per second", 0) > 0, outcome.problem
    ranked = np.load(wide.ranked)
    measure(task("ours"))  # the further rows change nothing
    numbers = quality(ranked, np.load(wide.ranked), ranked[:, 0])
    assert numbers == {"valid places": 1.0, "recall": 1.0, "like ours": 1.0}


def test_a_widened_policy_has_the_same_logits_of_its_own_tokens(tiny, tmp_path):
    write_widened(tiny.checkpoint, tmp_path / "wide", 700)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(tiny.checkpoint, dtype=torch.float32)
    prompt = torch.from_numpy(tiny.prompts(["direct"]).tokens[0].astype(np.int64))[None]
    with torch.inference_mode():
        logits = wide(prompt).logits
        assert logits.shape[-1] == 700
        expected = own(prompt).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)


def test_what_is_no_item_or_listed_before_is_not_valid(task):
    spellings = ItemSpellings(task("ours"))
    one, other = (list(tokens) for tokens in list(spellings.rows)[:2])
    rows = spellings.ranked([one, other[:-1], [*one, one[0]], [one[0]], [spellings.end]], 6)
    assert rows == [spellings.rows[tuple(one)], spellings.rows[tuple(other)], -1, -1, -1, -1]
    assert spellings.allowed(one[:-1])[-1] == spellings.end
    assert spellings.allowed([*one, one[0]]) == [spellings.end]


def test_the_table_compares_with_the_first_subject():
    outcomes = [
        Outcome("ours", NUMBERS), Outcome("slow", {**NUMBERS, "users per second": 2.0}),
        Outcome("late", {}, problem="stopped after 9 s"),
    ]  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_table("case", outcomes))
    text = console.export_text()
    assert "4.00" in text
    assert "stopped after 9 s" in text
