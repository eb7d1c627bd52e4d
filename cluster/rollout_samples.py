"""A table of responses that a step trained on, readable in MLflow: one group of each mode."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from cluster.placement import DeadlineExceeded
from cluster.progress import console
from cluster.reward_pool import RewardPool
from cluster.rollout_scheduler import ScoredGroup
from curriculum.corpus import Corpus
from item_index.constraint import MODES

COLUMNS = ("mode", "true item", "reward", "hit", "response")


def sampled_responses(groups: Sequence[ScoredGroup], rewards: RewardPool, corpus: Corpus) -> dict[str, list]:
    """The columns of the table: the first group of each mode, the best responses first, semantic IDs as titles.

    Where a worker or the rollouts are lost in this moment that is said, and the rows are missing: the next step deals
    with the loss.
    """
    rows: list[tuple] = []
    for flag, mode in enumerate(MODES):
        group = next((group for group in groups if group.reasoning == bool(flag)), None)
        if group is None:
            continue
        try:
            rollouts = rewards.rollouts_of(group.batch, group.place)
        except (ray.exceptions.RayError, DeadlineExceeded) as error:
            console.print(
                f"train: no sample of {mode} responses: {error}", style="yellow", highlight=False, markup=False
            )
            continue
        truth = corpus.catalogue.titles[int(rollouts.prompts.targets[0])]
        for row in sorted(range(len(group.rewards)), key=lambda row: -group.rewards[row]):
            text = corpus.with_titles(corpus.tokenizer.decode(rollouts.responses[row].tolist())).strip()
            rows.append((mode, truth, round(float(group.rewards[row]), 4), bool(group.hits[row]), text))
    return {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
