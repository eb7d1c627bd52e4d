"""Training once more on groups that a run kept: the learner alone, without engine and rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.learner_ranks import LearnerRanks
from cluster.placement import placed, ray_session
from cluster.progress import console, progress_bar
from cluster.settings import Settings
from cluster.tracking import Tracker
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from learner.rollout_files import read_trained_groups


def rollout_files(path: Path) -> list[Path]:
    """The file, or all files of the folder in the order of their steps. Raises InputError where there is none."""
    files = sorted(path.glob("step-*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError("the folder holds no groups of any step (step-*.parquet)", file=path)
    return files


def run_replay(
    settings: Settings, index_folder: Path, sft_checkpoint: Path, files: list[Path], folder: Path, tracker: Tracker
) -> dict[str, Any]:
    """Update the supervised checkpoint by the groups of each file in turn; the result is `folder/checkpoint`, and
    `folder/metrics.jsonl` has the metrics of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    index, model = str(index_folder.resolve()), str(sft_checkpoint.resolve())
    with (
        ray_session(settings.cluster),
        placed(settings.cluster, engines=0, learner_ranks=settings.train.ranks) as placement,
        progress_bar("replay", len(files)) as bar,
        (folder / "metrics.jsonl").open("w") as lines,
    ):
        learner = LearnerRanks(placement, settings, index, model)
        for file in files:
            groups = read_trained_groups(file)
            members = np.array([(0, place) for place in range(len(groups.batch))], np.int64)
            advantages = RaggedArray(groups.advantages, groups.batch.group_starts)
            metrics = learner.update(members, advantages, [ray.put(groups.batch)])
            reward = float(np.mean(groups.rewards))
            tracker.metrics({f"replay/{name}": value for name, value in metrics.items()}, groups.step)
            lines.write(json.dumps({"step": groups.step, "reward": reward, **metrics}) + "\n")
            bar.advance(reward=reward, loss=metrics["loss"])
        learner.save(folder / "checkpoint")
    console.print(f"replay: {len(files)} steps, checkpoint in {folder / 'checkpoint'}", highlight=False)
    return {"steps": len(files)}
