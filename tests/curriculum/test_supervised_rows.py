"""The rows of one pass: which there are, and where the reasoning rows stand among them."""

import numpy as np
import pytest

from curriculum.alignment import TASKS, AlignmentData
from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.rows import ReasoningExample
from curriculum.schedule import reasoning_positions
from curriculum.supervised_rows import REASONING, rows_of_pass
from item_index.catalogue import Catalogue


class Share:
    weight, cap = 1.0, None


@pytest.fixture(scope="module")
def data(tiny):
    items = len(tiny.index)
    catalogue = Catalogue(
        item_ids=tiny.index.item_ids, titles=tuple(f"Tale {row}" for row in range(items)),
        descriptions=("",) * items, categories=((),) * items, brands=("",) * items,
    )  # fmt: skip
    places = np.arange(60)
    sequences = UserSequences(tuple("abc"), np.array([0, 20, 40, 60]), places % items, places)
    builder = PromptBuilder(tiny.tokenizer, tiny.index, tiny.constraint.tokens, history_items=3)
    return AlignmentData(catalogue, sequences, np.zeros(60, bool), builder, [])


@pytest.fixture(scope="module")
def reasoning(data):
    think = "Evidence: one. Preference: two. Intent: three. Recommendation: four."
    items = data.sequences.items.tolist()
    return [
        ReasoningExample(at, tuple(items[at - 3 : at]), items[at], think, "Rewritten history: ", "metadata")
        for at in (5, 8, 11, 30, 35)
    ]


@pytest.mark.parametrize("dense", [False, True])
def test_reasoning_rows_grow_denser_or_do_not_among_the_same_rows(data, reasoning, dense):
    tasks = {task.name: Share() for task in TASKS}
    passes = {
        uniform: list(rows_of_pass(data, reasoning, tasks, number=0, uniform=uniform, dense=dense, seed=3))
        for uniform in (False, True)
    }
    for uniform, rows in passes.items():
        places = [place for place, (task, _) in enumerate(rows) if task == REASONING]
        assert places == reasoning_positions(len(rows), len(reasoning), uniform=uniform).tolist()
    growing, even = (sorted(task for task, _ in rows) for rows in passes.values())
    assert growing == even
    assert np.mean([task == REASONING for task, _ in passes[False][: len(growing) // 2]]) < len(reasoning) / len(
        growing
    )
