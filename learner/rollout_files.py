"""Groups that a step trained on, as a Parquet file: to look at, and to train on again without an engine.

A row per group. What the allowed sets depend on is in it (mode, budget, excluded items, index version), as are the
sampler's log-probabilities, rewards and advantages, so nothing but the index and a checkpoint is needed to train on it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from item_index.constraint import MODES
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch, RolloutPrompts

SCHEMA = pa.schema(
    {
        "mode": pa.string(), "prompt": pa.list_(pa.int32()), "target": pa.int32(), "budget": pa.int32(),
        "excluded": pa.list_(pa.int32()), "weight_version": pa.int64(), "responses": pa.list_(pa.list_(pa.int32())),
        "log_probabilities": pa.list_(pa.list_(pa.float32())), "rewards": pa.list_(pa.float32()),
        "advantages": pa.list_(pa.float32()),
    }
)  # fmt: skip
_HEADER = b"gream"


@dataclass(frozen=True)
class TrainedGroups:
    """The groups of one step.

    Attributes:
        step: of the loop, from 1.
        batch: their rollouts.
        rewards, advantages: float32 [R], of the responses, group after group.
    """

    step: int
    batch: RolloutBatch
    rewards: np.ndarray
    advantages: np.ndarray


def write_trained_groups(path: str | os.PathLike[str], groups: TrainedGroups) -> None:
    """Write the groups of one step; the file is there whole or not at all."""
    batch, starts = groups.batch, groups.batch.group_starts
    per_group = {name: RaggedArray(getattr(groups, name), starts) for name in ("rewards", "advantages")}
    columns = {
        "mode": [MODES[int(reasoning)] for reasoning in batch.prompts.reasoning],
        "prompt": _lists(batch.prompts.tokens, pa.int32()),
        "target": batch.prompts.targets,
        "budget": batch.prompts.budgets,
        "excluded": _lists(batch.prompts.excluded, pa.int32()),
        "weight_version": batch.weight_versions,
        "responses": pa.ListArray.from_arrays(starts.astype(np.int32), _lists(batch.responses, pa.int32())),
        "log_probabilities": pa.ListArray.from_arrays(
            starts.astype(np.int32), _lists(batch.log_probabilities, pa.float32())
        ),
        **{name: _lists(values, pa.float32()) for name, values in per_group.items()},
    }
    header = json.dumps({"step": groups.step, "index_version": batch.index_version})
    table = pa.table(columns, schema=SCHEMA.with_metadata({_HEADER: header}))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    pq.write_table(table, unfinished)
    unfinished.replace(target)


def read_trained_groups(path: str | os.PathLike[str]) -> TrainedGroups:
    """Read what `write_trained_groups` wrote. Raises InputError for any other file."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError("the file does not exist", file=path) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not readable as Parquet ({error})", file=path) from error
    header = (table.schema.metadata or {}).get(_HEADER)
    if header is None or table.schema.names != SCHEMA.names or not table.num_rows:
        raise InputError(
            "the file does not hold the groups of a step", file=path,
            remedy="Give a file that `gream train` wrote into rollouts/ with train.dump_rollouts.",
        )  # fmt: skip
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    about = json.loads(header)
    responses = columns["responses"]
    sizes = np.diff(responses.offsets.to_numpy())
    batch = RolloutBatch(
        prompts=RolloutPrompts(
            tokens=_ragged(columns["prompt"]),
            targets=columns["target"].to_numpy(),
            reasoning=np.array([mode == "reasoning" for mode in columns["mode"].to_pylist()]),
            budgets=columns["budget"].to_numpy(),
            excluded=_ragged(columns["excluded"]),
        ),
        group_sizes=sizes.astype(np.int64),
        responses=_ragged(responses.values),
        log_probabilities=_ragged(columns["log_probabilities"].values),
        weight_versions=columns["weight_version"].to_numpy(),
        index_version=about["index_version"],
    )
    return TrainedGroups(
        about["step"], batch, _ragged(columns["rewards"]).values, _ragged(columns["advantages"]).values
    )


def _lists(rows: RaggedArray, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(rows.offsets.astype(np.int32), pa.array(rows.values, type=kind))


def _ragged(column: pa.ListArray) -> RaggedArray:
    return RaggedArray(column.values.to_numpy(), column.offsets.to_numpy().astype(np.int64))
