"""Groups of a step in a file: what is read is what was written, and other files are refused."""

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from learner.rollout_files import TrainedGroups, read_trained_groups, write_trained_groups

MODES = ["direct", "reasoning", "reasoning", "direct"]


def random_groups(tiny):
    generator = np.random.default_rng(0)
    prompts = tiny.prompts(MODES, excluded=[[1, 2], [], [5], []])
    batch = tiny.random_rollouts(prompts, responses=[3, 1, 4, 2], seed=0)
    log_probabilities = RaggedArray(
        generator.normal(size=len(batch.responses.values)).astype(np.float32), batch.responses.offsets
    )
    batch = type(batch)(
        batch.prompts, batch.group_sizes, batch.responses, log_probabilities, np.array([4, 4, 3, 4]),
        batch.index_version,
    )  # fmt: skip
    rewards, advantages = generator.normal(size=(2, len(batch.responses))).astype(np.float32)
    return TrainedGroups(7, batch, rewards, advantages)


def assert_same(one, other):
    """Field by field, to the bit and the data type."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if hasattr(a, "__dataclass_fields__"):
            assert_same(a, b)
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert np.array_equal(a, b), field.name
        else:
            assert a == b, field.name


def test_what_is_read_is_what_was_written(tiny, tmp_path):
    groups = random_groups(tiny)
    file = tmp_path / "rollouts" / "step-000007.parquet"
    write_trained_groups(file, groups)
    assert_same(groups, read_trained_groups(file))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_some_groups_of_a_batch_are_written_as_they_are(tiny, tmp_path):
    groups = random_groups(tiny)
    rows = np.array([0, 1, 2, 8, 9])  # the responses of groups 0 and 3
    some = TrainedGroups(1, groups.batch.select(np.array([0, 3])), groups.rewards[rows], groups.advantages[rows])
    write_trained_groups(tmp_path / "some.parquet", some)
    assert_same(some, read_trained_groups(tmp_path / "some.parquet"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_trained_groups(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_trained_groups(tmp_path / "text.parquet")
    pq.write_table(pa.table({"mode": ["direct"]}), tmp_path / "table.parquet")
    with pytest.raises(InputError, match="does not hold the groups of a step"):
        read_trained_groups(tmp_path / "table.parquet")
