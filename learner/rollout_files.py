"""Groups that a step trained on, as a Parquet file: to look at, and to train on again without an engine.

A row per group. What the allowed sets depend on is in it (mode, budget, excluded items, index version), as are the
sampler's log-probabilities, rewards and advantages, so nothing but the index and a checkpoint is needed to train on it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from item_index.constraint import MODES
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch, RolloutPrompts

BATCH_SCHEMA = pa.schema(
    {
        "mode": pa.string(), "prompt": pa.list_(pa.int32()), "target": pa.int32(), "budget": pa.int32(),
        "excluded": pa.list_(pa.int32()), "weight_version": pa.int64(), "responses": pa.list_(pa.list_(pa.int32())),
        "log_probabilities": pa.list_(pa.list_(pa.float32())),
    }
)  # fmt: skip
SCHEMA = pa.schema(
    [*BATCH_SCHEMA, pa.field("rewards", pa.list_(pa.float32())), pa.field("advantages", pa.list_(pa.float32()))]
)
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
    per_group = {
        name: RaggedArray(getattr(groups, name), groups.batch.group_starts) for name in ("rewards", "advantages")
    }
    columns = _columns(groups.batch) | {name: _lists(values, pa.float32()) for name, values in per_group.items()}
    _write(path, columns, SCHEMA, {"step": groups.step, "index_version": groups.batch.index_version})


def read_trained_groups(path: str | os.PathLike[str]) -> TrainedGroups:
    """Read what `write_trained_groups` wrote. Raises InputError for any other file."""
    columns, about = _read(
        path, SCHEMA, holds="the groups of a step",
        remedy="Give a file that `gream train` wrote into rollouts/ with train.dump_rollouts.",
    )  # fmt: skip
    return TrainedGroups(
        about["step"], _batch(columns, about), _ragged(columns["rewards"]).values, _ragged(columns["advantages"]).values
    )


def write_batch(path: str | os.PathLike[str], batch: RolloutBatch) -> None:
    """Write groups that nothing was trained on yet; the file is there whole or not at all."""
    _write(path, _columns(batch), BATCH_SCHEMA, {"index_version": batch.index_version})


def read_batch(path: str | os.PathLike[str]) -> RolloutBatch:
    """Read what `write_batch` wrote. Raises InputError for any other file."""
    columns, about = _read(path, BATCH_SCHEMA, holds="rollouts", remedy="Remove the training state that it is of.")
    return _batch(columns, about)


def _columns(batch: RolloutBatch) -> dict[str, Any]:
    starts = batch.group_starts.astype(np.int32)
    return {
        "mode": [MODES[int(reasoning)] for reasoning in batch.prompts.reasoning],
        "prompt": _lists(batch.prompts.tokens, pa.int32()),
        "target": batch.prompts.targets,
        "budget": batch.prompts.budgets,
        "excluded": _lists(batch.prompts.excluded, pa.int32()),
        "weight_version": batch.weight_versions,
        "responses": pa.ListArray.from_arrays(starts, _lists(batch.responses, pa.int32())),
        "log_probabilities": pa.ListArray.from_arrays(starts, _lists(batch.log_probabilities, pa.float32())),
    }


def _batch(columns: dict[str, Any], about: dict[str, Any]) -> RolloutBatch:
    responses = columns["responses"]
    return RolloutBatch(
        prompts=RolloutPrompts(
            tokens=_ragged(columns["prompt"]),
            targets=columns["target"].to_numpy(),
            reasoning=np.array([mode == "reasoning" for mode in columns["mode"].to_pylist()]),
            budgets=columns["budget"].to_numpy(),
            excluded=_ragged(columns["excluded"]),
        ),
        group_sizes=np.diff(responses.offsets.to_numpy()).astype(np.int64),
        responses=_ragged(responses.values),
        log_probabilities=_ragged(columns["log_probabilities"].values),
        weight_versions=columns["weight_version"].to_numpy(),
        index_version=about["index_version"],
    )


def _write(path: str | os.PathLike[str], columns: dict[str, Any], schema: pa.Schema, about: dict[str, Any]) -> None:
    table = pa.table(columns, schema=schema.with_metadata({_HEADER: json.dumps(about)}))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    pq.write_table(table, unfinished)
    unfinished.replace(target)


def _read(
    path: str | os.PathLike[str], schema: pa.Schema, *, holds: str, remedy: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns by name, and what the header says."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError("the file does not exist", file=path) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not readable as Parquet ({error})", file=path) from error
    header = (table.schema.metadata or {}).get(_HEADER)
    if header is None or table.schema.names != schema.names or not table.num_rows:
        raise InputError(f"the file does not hold {holds}", file=path, remedy=remedy)
    return {name: table[name].combine_chunks() for name in table.column_names}, json.loads(header)


def _lists(rows: RaggedArray, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(rows.offsets.astype(np.int32), pa.array(rows.values, type=kind))


def _ragged(column: pa.ListArray) -> RaggedArray:
    return RaggedArray(column.values.to_numpy(), column.offsets.to_numpy().astype(np.int64))
