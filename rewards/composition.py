"""What a response is worth: a weighted sum of rewards, those that are built in or the user's own.

A reward of the user's is anything that can be called with a `RewardSample` and returns a finite number; a class is made
once in every reward worker, without arguments. It is named by its import path, `package.module:name`.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

from item_index.constraint import MODES
from item_index.input_error import InputError
from rewards.residual import residual_sensitive_reward

RESIDUAL_SENSITIVE, COLLABORATIVE = "residual_sensitive", "collaborative"


@dataclass(frozen=True)
class RewardSample:
    """One response, as a reward sees it.

    Attributes:
        mode: that the prompt asked for.
        tokens: of the response.
        history: ids of the items that the prompt shows, the oldest first.
        true_item: id of the item that came next.
        answered_item: id of the answered item; None where the answer is none of the catalogue.
        true_codes, answered_codes: their semantic IDs, a code per level; `answered_codes` is None without an answer.
        levels: H, residual levels of a semantic ID, without the collision level.
        well_formed: the response has the format of its mode.
        forced: the token budget forced its closing; such a response is not well formed.
    """

    mode: Literal["direct", "reasoning"]
    tokens: tuple[int, ...]
    history: tuple[str | int, ...]
    true_item: str | int
    answered_item: str | int | None
    true_codes: tuple[int, ...]
    answered_codes: tuple[int, ...] | None
    levels: int
    well_formed: bool
    forced: bool
    decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False)

    @cached_property
    def text(self) -> str:
        """The response in words, semantic IDs as they are written."""
        return self.decode(self.tokens)

    @property
    def hit(self) -> bool:
        """The answer is the true item, format included."""
        return self.well_formed and self.answered_item == self.true_item


class Reward(Protocol):
    """What an import path of `train.rewards` has to lead to."""

    def __call__(self, sample: RewardSample) -> float: ...


@dataclass(frozen=True)
class RewardTerm:
    """A summand: its name in metrics and messages, its weight, what computes it, whether that is ours, and the modes
    whose responses it counts for."""

    name: str
    weight: float
    function: Reward
    built_in: bool = False
    modes: tuple[str, ...] = MODES

    def value(self, sample: RewardSample) -> float:
        """The reward of a sample, unweighted. Raises ValueError where it is not a finite number."""
        value = self.function(sample)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            raise ValueError(f"it returned {value!r}, which is not a finite number")
        return number


def residual_sensitive(sample: RewardSample) -> float:
    """GREAM's reward of a sample; see `residual_sensitive_reward`."""
    if sample.answered_codes is None:
        return 0.0
    return residual_sensitive_reward(
        sample.answered_codes, sample.true_codes, levels=sample.levels, well_formed=sample.well_formed
    )


def exact_match(sample: RewardSample) -> float:
    """1 for a hit, else 0: what the residual-sensitive reward is compared with."""
    return float(sample.hit)


def not_fitted(sample: RewardSample) -> float:
    """Stands for a built-in reward that has to see the train interactions first."""
    raise ValueError("the reward was not fitted to train interactions")


BUILT_IN: dict[str, Reward] = {
    RESIDUAL_SENSITIVE: residual_sensitive, "exact_match": exact_match, COLLABORATIVE: not_fitted,
}  # fmt: skip


def load_reward_term(
    reward: str, *, weight: float = 1.0, name: str | None = None, modes: Sequence[str] = MODES,
    collaborative: Reward = not_fitted,
) -> RewardTerm:  # fmt: skip
    """The term of a built-in reward, or of what an import path leads to.

    Args:
        collaborative: what computes the reward of that name, fitted.

    Raises InputError that names the path where it leads to nothing that can be called with one sample.
    """
    if reward in BUILT_IN:
        function = collaborative if reward == COLLABORATIVE else BUILT_IN[reward]
        return RewardTerm(name or reward, weight, function, built_in=True, modes=tuple(modes))
    module_name, separator, attribute = reward.partition(":")
    remedy = "Write package.module:name; the module must be importable on every node (see docs/rewards.md)."
    if not separator or not module_name or not attribute:
        raise InputError(f"the reward {reward!r} is neither {' nor '.join(BUILT_IN)} nor an import path", remedy=remedy)
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"the module of the reward {reward!r} cannot be imported: {error}", remedy=remedy) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"the module of the reward {reward!r} has no {attribute!r}", remedy=remedy)
        found = getattr(found, part)
    function = found() if inspect.isclass(found) else found
    if not callable(function):
        raise InputError(f"the reward {reward!r} cannot be called", remedy=remedy)
    return RewardTerm(name or attribute, weight, function, modes=tuple(modes))
