"""What learner and rollout engine say of the weights that they have, so that a difference is noticed: sums over every
weight, however the engine fuses or packs it, and log-probabilities of some tokens, for what is derived from weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

REORDERED = 1e-12  # of a float64 sum in another order, by the sum of the absolute values


class LearnerSum(NamedTuple):
    """Of one tensor, in float64: sum of its elements and of their absolute values; and its dtype as torch spells it."""

    total: float
    absolute: float
    dtype: str


class EngineSum(NamedTuple):
    """Of one parameter of the engine: the checkpoint's tensors that are fused in it, the float64 sum of its elements,
    its dtype, and whether the sum is that of a product with ones, for packed weights that cannot be read."""

    names: tuple[str, ...]
    total: float
    dtype: str
    multiplied: bool


Sums = TypeVar("Sums")
LearnerSums = dict[str, LearnerSum]
EngineSums = list[EngineSum]


@dataclass(frozen=True)
class WeightProbe(Generic[Sums]):
    """What one side says with the weights of `version`.

    Attributes:
        log_probabilities_T: float32, of every token of the probe but the first, without a constraint.
        sums: the learner's by name, the engine's one after the other, none from an engine of several devices.
    """

    version: int
    log_probabilities_T: np.ndarray
    sums: Sums


def learner_sum(weight: torch.Tensor) -> LearnerSum:
    """Sums over a tensor on any device."""
    total, absolute = (float(values.sum(dtype=torch.float64)) for values in (weight, weight.abs()))
    return LearnerSum(total, absolute, str(weight.dtype).removeprefix("torch."))


def different_weights(learner: LearnerSums, engine: EngineSums) -> tuple[list[str], int]:
    """Names of the tensors whose sums differ by more than rounding explains, and how many tensors were compared.

    Rounding is at most half a unit in the last place of every element, where the engine's dtype is another one or its
    weights are packed. A parameter of which the learner does not know all tensors by name is not compared.
    """
    wrong: list[str] = []
    compared = 0
    for names, total, dtype, multiplied in engine:
        if not all(name in learner for name in names):
            continue
        compared += len(names)
        sums = [learner[name] for name in names]
        exact = not multiplied and all(one.dtype == dtype for one in sums)
        tolerance = REORDERED if exact else torch.finfo(getattr(torch, dtype)).eps / 2
        gap = abs(total - sum(one.total for one in sums))
        if not gap <= tolerance * sum(one.absolute for one in sums):  # a sum that is no number differs
            wrong += names
    return wrong, compared
