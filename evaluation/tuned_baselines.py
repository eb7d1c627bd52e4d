"""Baselines tuned fairly: by validation targets alone, then fitted on all that precedes what they have to rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from curriculum.interactions import UserSequences
from evaluation.baselines import (
    COUNTING_BASELINES,
    Baseline,
    BaselineName,
    MarkovChain,
    Popularity,
    rank_unseen,
)
from evaluation.metrics import ranking_measures
from evaluation.sequential_baselines import SequentialArchitecture, SequentialRecommender
from item_index.neighbours import ItemKNearestNeighbours

TUNING_CUTOFF = 10
PATIENCE = 8  # passes without a better validation figure after which a neural baseline is given up
_USERS_AT_A_TIME = 1024


def tuned_baselines(
    sequences: UserSequences,
    items: int,
    *,
    names: Sequence[BaselineName] = COUNTING_BASELINES,
    part: Literal["test", "validation"] = "test",
    seed: int = 0,
    windows: Sequence[int] = (1, 2, 3, 5, 8, 12),
    neighbours: Sequence[int] = (50, 200, 1000),
    shrinks: Sequence[float] = (0.0, 10.0),
    decays: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8),
    dropouts: Sequence[float] = (0.2, 0.4),
    layers: Sequence[int] = (1, 2),
    passes: int = 60,
) -> dict[BaselineName, Baseline]:
    """The named baselines, ready to rank the targets of `part`.

    The hyper-parameters with the highest ndcg@10 on the validation targets are taken (the first of equal ones), with
    baselines fitted on the train parts and the train part as the history; the number of passes of a neural baseline is
    one of them. For `part="test"` the baselines are then fitted anew on everything before the test targets, train part
    and validation item: that is what is known by then, and it is the history from which the test target has to be
    ranked. For `part="validation"` they stay fitted on the train parts; their figures are then the best of the grid,
    hence a little too good. Test targets are never looked at.

    Args:
        seed: of the neural baselines' weights, batches and dropout.
        windows: of the Markov chain; `neighbours`, `shrinks` and `decays`: of item-kNN.
        dropouts, layers: of the neural baselines; `passes`: the most over the training items.
    """
    users = range(len(sequences))
    train = [sequences.train(user) for user in users]
    known = train if part == "validation" else [sequences.sequence(user)[:-1] for user in users]
    targets_U = np.array([sequences.sequence(user)[-2] for user in users])

    def validated(baseline: Baseline) -> float:
        return _ndcg(baseline, train, targets_U, items)

    def tuned(name: BaselineName) -> Baseline:
        if name == "popularity":
            return Popularity()
        if name == "markov":
            return max(map(MarkovChain, windows), key=lambda chain: validated(chain.fit(train, items)))
        if name == "item_knn":
            return _tuned_neighbours(train, items, validated, neighbours, shrinks, decays)
        return _tuned_recommender(name, train, items, validated, dropouts, layers, passes, seed)

    return {name: tuned(name).fit(known, items) for name in names}


def _tuned_neighbours(
    train: list[np.ndarray], items: int, validated: Callable[[Baseline], float], neighbours: Sequence[int],
    shrinks: Sequence[float], decays: Sequence[float],
) -> ItemKNearestNeighbours:  # fmt: skip
    chosen, highest = ItemKNearestNeighbours(), -1.0
    for size, shrink in itertools.product(neighbours, shrinks):
        fitted = ItemKNearestNeighbours(size, shrink).fit(train, items)
        for decay in decays:
            fitted.decay = decay  # plays no part in fitting
            ndcg = validated(fitted)
            if ndcg > highest:
                chosen, highest = ItemKNearestNeighbours(size, shrink, decay), ndcg
    return chosen


def _tuned_recommender(
    architecture: SequentialArchitecture, train: list[np.ndarray], items: int,
    validated: Callable[[Baseline], float], dropouts: Sequence[float], layers: Sequence[int], passes: int, seed: int,
) -> SequentialRecommender:  # fmt: skip
    """Of all settings and numbers of passes the best; a setting is given up after `PATIENCE` passes without gain."""
    chosen, highest = SequentialRecommender(architecture, seed=seed), -1.0
    for depth, dropout in itertools.product(layers, dropouts):
        recommender = SequentialRecommender(architecture, layers=depth, dropout=dropout, passes=passes, seed=seed)
        best_here, at = -1.0, 0
        for done in recommender.training(train, items):
            ndcg = validated(recommender)
            if ndcg > best_here:
                best_here, at = ndcg, done
            if ndcg > highest:
                chosen, highest = replace(recommender, passes=done), ndcg
            if done - at >= PATIENCE:
                break
    return chosen


def _ndcg(baseline: Baseline, histories: list[np.ndarray], targets_U: np.ndarray, items: int) -> float:
    """ndcg@10 of the unseen items; some users at a time, so that memory does not grow with their number."""
    ranked = []
    for start in range(0, len(histories), _USERS_AT_A_TIME):
        part = histories[start : start + _USERS_AT_A_TIME]
        ranked.append(rank_unseen(baseline.scores(part), part, TUNING_CUTOFF))
    measures = ranking_measures(np.concatenate(ranked), targets_U, items=items, cutoffs=(TUNING_CUTOFF,))
    return float(measures[f"ndcg@{TUNING_CUTOFF}"].mean())
