"""Alarms: what says early that a policy goes astray while its rewards still look well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from cluster.section import Section


class AlarmSection(Section):
    action: Literal["warn", "stop"] = Field(
        "warn", description="What an alarm does: print a warning, or save the policy and end the stage."
    )
    baseline_steps: int = Field(5, ge=1, description="First steps whose mean is what the shares below refer to.")
    ratio_drift: float | None = Field(
        0.2,
        gt=0,
        description="Mean of the learner's over the sampler's probability may be that far from 1; null is off.",
    )
    entropy_share: float | None = Field(
        0.2, gt=0, lt=1, description="Share of its first value below which the policy's entropy is an alarm."
    )
    coverage_share: float | None = Field(
        0.2, gt=0, lt=1, description="The same for the number of different answers by that of answers."
    )
    chain_length_share: float | None = Field(
        0.3, gt=0, lt=1, description="The same for the tokens of a chain, and 1 / share above which it is one as well."
    )
    forced_close_rate: float | None = Field(
        0.5, gt=0, lt=1, description="Share of reasoning responses closed by force above which it is an alarm."
    )


@dataclass(frozen=True)
class Alarm:
    """An alarm of one step.

    Attributes:
        name: field of `AlarmSection` that set the bound.
        message: what is seen, what it may mean, and what to do.
    """

    name: str
    step: int
    value: float
    bound: float
    action: Literal["warn", "stop"]
    message: str


@dataclass(frozen=True)
class _Watch:
    metric: str
    seen: str
    meaning: str


_WATCHES = {
    "ratio_drift": _Watch(
        "learner/sampler_ratio", "the learner's over the sampler's probability",
        "Engine and learner do not hold the same policy: the weights may not arrive, rollouts are too old, or their "
        "arithmetic differs. Look at weight_gap and learner/staleness, and lower train.max_staleness.",
    ),
    "entropy_share": _Watch(
        "learner/entropy_estimate", "the policy's entropy",
        "The policy becomes certain and stops to explore. Lower train.learning_rate, or raise "
        "train.objective.kl_coefficient or train.temperature.",
    ),
    "coverage_share": _Watch(
        "coverage", "the share of different answers",
        "The policy answers a few popular items to everyone. Lower train.learning_rate, or raise "
        "train.objective.kl_coefficient.",
    ),
    "chain_length_share": _Watch(
        "chains/think_tokens", "the mean length of the chains",
        "Chains collapse, or run on until they are closed by force. Read them by `gream rollouts show`, and look at "
        "train.minimum_think_tokens and train.reasoning_budget.",
    ),
    "forced_close_rate": _Watch(
        "forced_close_rate", "the share of chains closed by force",
        "Most chains do not end inside the token budget and earn no format credit. Raise train.reasoning_budget, or "
        "train the supervised stage for longer.",
    ),
}  # fmt: skip
_RELATIVE = ("entropy_share", "coverage_share", "chain_length_share")


class Alarms:
    """Looks at the metrics of every step; an alarm sounds when its bound is crossed, and again after it was quiet."""

    def __init__(self, settings: AlarmSection) -> None:
        self.settings = settings
        self.first_values: dict[str, list[float]] = {name: [] for name in _RELATIVE}
        self.sounding: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin with this step; a metric that is absent or not a number sounds none."""
        begun = []
        for name, watch in _WATCHES.items():
            setting, value = getattr(self.settings, name), metrics.get(watch.metric, math.nan)
            if setting is None or math.isnan(value):
                continue
            low, high = self._bounds(name, setting, value)
            if low <= value <= high:
                self.sounding.discard(name)
            elif name not in self.sounding:
                self.sounding.add(name)
                bound = low if value < low else high
                message = (
                    f"step {step}: {watch.seen} is {value:.4g}, {'below' if value < low else 'above'} {bound:.4g} "
                    f"(train.alarms.{name}). {watch.meaning}"
                )
                begun.append(Alarm(name, step, value, bound, self.settings.action, message))
        return begun

    def _bounds(self, name: str, setting: float, value: float) -> tuple[float, float]:
        if name == "ratio_drift":
            return 1 - setting, 1 + setting
        if name == "forced_close_rate":
            return -math.inf, setting
        first = self.first_values[name]
        if len(first) < self.settings.baseline_steps:
            first.append(value)
            return -math.inf, math.inf
        mean = sum(first) / len(first)
        return setting * mean, mean / setting if name == "chain_length_share" else math.inf

    def state(self) -> dict[str, Any]:
        """What the alarms remember, for a checkpoint."""
        return {"first_values": {n: list(v) for n, v in self.first_values.items()}, "sounding": sorted(self.sounding)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what `state` gave."""
        self.first_values = {name: list(values) for name, values in state["first_values"].items()}
        self.sounding = set(state["sounding"])
