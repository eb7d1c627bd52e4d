"""Which prompts are generated when, and which groups a step trains on: dynamic sampling within a bounded staleness."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from actors.reward import ScoredResponses
from actors.rollout import GenerationSummary, prompt_seeds
from cluster.prompt_sampler import PromptSampler
from cluster.prompts import PromptSource
from cluster.reward_pool import RewardPool
from cluster.rollout_engines import EngineCall, RolloutEngines
from cluster.settings import Settings
from cluster.timers import Timers
from item_index.constraint import MODES, Mode
from learner.advantages import groups_with_variance
from learner.rollouts import RolloutPrompts

TRAINING = 1  # the stream of seeds; 0 is that of probes and evaluation
SLOWEST_ACCEPTANCE = 0.25  # a round asks for four times of what is missing at most
MEMORY = 0.8  # of the acceptance rate, from round to round


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """A group that has variance; the rollouts themselves stay in the object store, `batch` at `place`."""

    batch: ray.ObjectRef
    place: int
    reasoning: bool
    weight_version: int
    rewards: np.ndarray
    hits: np.ndarray


@dataclass(frozen=True)
class Round:
    """Prompts that were given to the engines together; `first` counts those of the run before them."""

    prompts: RolloutPrompts
    positions: np.ndarray
    first: int
    calls: list[EngineCall]


@dataclass(frozen=True)
class StepGroups:
    """What a step trains on and what it came from.

    Attributes:
        groups: direct ones first, each mode in the order of its prompts.
        scored: of everything that was taken from the engines for this step: mode flags of the groups, scores.
        metrics: counts.
    """

    groups: list[ScoredGroup]
    scored: list[tuple[np.ndarray, ScoredResponses]]
    metrics: dict[str, float]


class RolloutScheduler:
    """A stream of prompts in a fixed order, which the steps of the loop consume in that order.

    Groups without variance teach nothing, so a step asks for as many prompts more as the measured acceptance rate lets
    expect, and again while groups are missing. Groups are admitted in the order of their prompts, not in that of their
    arrival: short answers would come first. With `train.max_staleness` k above 0 the engines work ahead: before the
    update of step s the prompts of the steps up to s + k are given to them, under the weights of that moment, so what a
    step trains on is k versions behind at most (k = 1 is one step off), and surplus groups wait for the next step as
    long as they are fresh enough. With 0 nothing is generated ahead, and surplus groups are dropped. What is asked for
    depends on scores alone, not on time, so a seed fixes the schedule as well.
    """

    def __init__(
        self, settings: Settings, source: PromptSource, engines: RolloutEngines, rewards: RewardPool, timers: Timers
    ) -> None:
        self.settings, self.source, self.engines, self.rewards = settings, source, engines, rewards
        self.timers = timers
        train = settings.train
        reasoning = round(train.reasoning_share * train.prompts_per_step)
        self.quota = {False: train.prompts_per_step - reasoning, True: reasoning}
        self.sampler = PromptSampler(
            source.reinforcement_positions(settings.corpus.minimum_history), settings.seed,
            curriculum=train.prompt_curriculum,
        )  # fmt: skip
        self.rounds: deque[Round] = deque()
        self.surplus: list[ScoredGroup] = []
        self.generated, self.accepted = {mode: 0.0 for mode in self.quota}, {mode: 0.0 for mode in self.quota}
        self.prompts_made = 0

    def groups_for(self, step: int, version: int) -> StepGroups:
        """The groups of a step of a learner at `version`; waits for engines and rewards.

        A mode that has too few groups after `train.generation_rounds` rounds gives those that it has. Raises
        RuntimeError where no mode has any.
        """
        oldest = version - self.settings.train.max_staleness
        groups = [group for group in self.surplus if group.weight_version >= oldest]
        expired = len(self.surplus) - len(groups)
        scored: list[tuple[np.ndarray, ScoredResponses]] = []
        summaries: list[GenerationSummary] = []
        for _round in range(self.settings.train.generation_rounds):
            missing = {mode: quota - sum(g.reasoning == mode for g in groups) for mode, quota in self.quota.items()}
            if max(missing.values()) <= 0:
                break
            if not self.rounds:
                self._begin_round(missing)
            found = self._finish_round(self.rounds.popleft(), scored, summaries)
            fresh = [group for group in found if group.weight_version >= oldest]
            expired += len(found) - len(fresh)
            groups += fresh
        chosen = [
            group
            for mode, quota in self.quota.items()
            for group in [group for group in groups if group.reasoning == mode][:quota]
        ]
        if not chosen:
            raise RuntimeError(f"step {step}: {nothing_to_train_on(scored, self.settings.train.generation_rounds)}")
        taken = set(chosen)
        left = [group for group in groups if group not in taken]
        keeps = self.settings.train.max_staleness > 0
        self.surplus = left if keeps else []
        return StepGroups(
            chosen, scored,
            {
                "groups_generated": float(sum(len(flags) for flags, _ in scored)),
                "groups_trained": float(len(chosen)),
                "groups_missing": float(sum(self.quota.values()) - len(chosen)),
                "groups_kept_for_later": float(len(self.surplus)),
                "groups_dropped": float(0 if keeps else len(left)),
                "groups_expired": float(expired),
                "groups_unscored": float(sum((~scores.scored).sum() for _, scores in scored)),
                "staleness_maximum": float(version - min(group.weight_version for group in chosen)),
                "rounds": float(len(scored)),
                "tokens_generated": float(sum(summary.tokens for summary in summaries)),
                "seconds/engine": sum(summary.seconds for summary in summaries),
            },
        )  # fmt: skip

    def run_ahead(self, step: int) -> None:
        """Give the engines the prompts of the next `train.max_staleness` steps, as far as they do not have them."""
        train = self.settings.train
        for ahead in range(1, min(train.max_staleness, train.steps - step) + 1):
            missing = {mode: math.ceil(quota * ahead - self._supply(mode)) for mode, quota in self.quota.items()}
            if max(missing.values()) > 0:
                self._begin_round(missing)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on with the same prompts, as JSON; beside it come the groups of `surplus`."""
        return {
            "sampler": self.sampler.state(),
            "generated": [self.generated[mode] for mode in self.quota],
            "accepted": [self.accepted[mode] for mode in self.quota],
            "prompts_made": self.prompts_made,
            "rounds": [
                {
                    "positions": one.positions.tolist(), "first": one.first,
                    "modes": [MODES[int(reasoning)] for reasoning in one.prompts.reasoning],
                }
                for one in self.rounds
            ],
            "surplus": [
                {
                    "reasoning": group.reasoning, "weight_version": group.weight_version,
                    "rewards": group.rewards.tolist(), "hits": group.hits.tolist(),
                }
                for group in self.surplus
            ],
        }  # fmt: skip

    def restore(self, state: dict[str, Any], surplus: ray.ObjectRef | None) -> None:
        """Go on where a scheduler of the same settings was when it gave its `state`.

        What the engines had been given is given to them again, with the same seeds and the weights that they have now.

        Args:
            surplus: batch of the groups that were kept, in their order; None where there were none.
        """
        self.sampler.restore(state["sampler"])
        for counts, name in ((self.generated, "generated"), (self.accepted, "accepted")):
            counts.update(zip(self.quota, state[name], strict=True))
        self.prompts_made = state["prompts_made"]
        assert surplus is not None or not state["surplus"], "the groups that were kept are missing"
        self.surplus = [
            ScoredGroup(
                surplus, place, group["reasoning"], group["weight_version"],
                np.array(group["rewards"], np.float32), np.array(group["hits"], bool),
            )
            for place, group in enumerate(state["surplus"])
            if surplus is not None
        ]  # fmt: skip
        self.rounds.clear()
        for one in state["rounds"]:
            self._give(np.array(one["positions"], np.int64), one["modes"], one["first"])

    def _supply(self, mode: bool) -> float:
        """Groups with variance that are there or can be expected of what the engines were given."""
        under_way = sum(int((one.prompts.reasoning == mode).sum()) for one in self.rounds)
        return sum(group.reasoning == mode for group in self.surplus) + under_way * self._acceptance(mode)

    def _acceptance(self, mode: bool) -> float:
        """Share of the groups that have variance; 1 until something is known."""
        if not self.generated[mode]:
            return 1.0
        return max(self.accepted[mode] / self.generated[mode], SLOWEST_ACCEPTANCE)

    def _begin_round(self, missing: dict[bool, int]) -> None:
        """Give the engines so many prompts that `missing` groups of each mode can be expected."""
        counts = {mode: math.ceil(n / self._acceptance(mode)) for mode, n in missing.items() if n > 0}
        positions = np.concatenate([self.sampler.draw(count, MODES[int(mode)]) for mode, count in counts.items()])
        modes = [MODES[int(mode)] for mode, count in counts.items() for _ in range(count)]
        self._give(positions, modes, self.prompts_made)
        self.prompts_made += len(positions)

    def _give(self, positions: np.ndarray, modes: list[Mode], first: int) -> None:
        """Let the engines begin with a round of prompts."""
        train, prompts = self.settings.train, self.source.prompts(positions, modes)
        seeds = prompt_seeds(self.settings.seed, TRAINING, len(prompts), first)
        calls = self.engines.generate(prompts, responses=train.responses, seeds=seeds, temperature=train.temperature)
        self.rounds.append(Round(prompts, positions, first, calls))

    def _finish_round(
        self, one: Round, scored: list[tuple[np.ndarray, ScoredResponses]], summaries: list[GenerationSummary]
    ) -> list[ScoredGroup]:
        """Wait for a round and its scores; the groups with variance, in the order of their prompts."""
        with self.timers("rollouts"):
            self.engines.wait(one.calls)
        with self.timers("rewards"):
            scores = self.rewards.score(
                [call.references[0] for call in one.calls],
                [len(call.prompts) for call in one.calls],
                responses=self.settings.train.responses,
            )
        reasoning = one.prompts.reasoning
        found: dict[int, ScoredGroup] = {}
        varied_G = np.zeros(len(reasoning), bool)
        varied_G[np.concatenate([call.prompts for call in one.calls])] = has_variance(scores)
        for call, of_call in zip(one.calls, scores, strict=True):
            scored.append((reasoning[call.prompts], of_call))
            summaries.append(call.result)
            ends = np.cumsum(of_call.group_sizes)
            for place in np.nonzero(varied_G[call.prompts])[0]:
                number = int(call.prompts[place])
                group = slice(ends[place] - of_call.group_sizes[place], ends[place])
                found[number] = ScoredGroup(
                    call.references[0], int(place), bool(reasoning[number]), call.result.weight_version,
                    of_call.rewards[group], of_call.hits[group],
                )  # fmt: skip
        for mode in self.quota:
            of_mode = reasoning == mode
            self.generated[mode] = MEMORY * self.generated[mode] + int(of_mode.sum())
            self.accepted[mode] = MEMORY * self.accepted[mode] + int(varied_G[of_mode].sum())
        for position, flag, varied in zip(one.positions, reasoning, varied_G, strict=True):
            self.sampler.record(int(position), MODES[int(flag)], bool(varied))
        return [found[number] for number in sorted(found)]


def has_variance(scores: Sequence[ScoredResponses]) -> np.ndarray:
    """bool [G] over the groups of all these: those that could be scored and whose rewards differ."""
    rewards_R, sizes_G, scored_G = (
        np.concatenate([getattr(some, name) for some in scores]) for name in ("rewards", "group_sizes", "scored")
    )
    varied = groups_with_variance(torch.from_numpy(np.nan_to_num(rewards_R)), torch.from_numpy(sizes_G))
    return varied.numpy() & scored_G


def alike_groups(scored: list[tuple[np.ndarray, ScoredResponses]]) -> dict[str, float]:
    """Shares of the generated groups whose rewards are all alike, by what that says of the prompt: `too_easy` where
    all responses are hits, `too_hard` where none earns anything, `alike` for the others."""
    scores = [some for _, some in scored]
    rewards_R, hits_R, sizes_G, scored_G = (
        np.concatenate([getattr(some, name) for some in scores])
        for name in ("rewards", "hits", "group_sizes", "scored")
    )
    starts_G = np.cumsum(sizes_G) - sizes_G
    alike_G = scored_G & ~has_variance(scores)
    easy_G = alike_G & np.logical_and.reduceat(hits_R, starts_G)
    hard_G = alike_G & ~easy_G & (np.maximum.reduceat(np.nan_to_num(rewards_R), starts_G) <= 0)
    counts = {"too_easy": easy_G, "too_hard": hard_G, "alike": alike_G & ~easy_G & ~hard_G}
    return {name: float(flags.mean()) for name, flags in counts.items()}


def nothing_to_train_on(scored: list[tuple[np.ndarray, ScoredResponses]], rounds: int) -> str:
    """Why no group of a step can be trained on, and what helps."""
    total, shares = sum(len(flags) for flags, _ in scored), alike_groups(scored)
    unscored = sum(int((~scores.scored).sum()) for _, scores in scored)
    remedies = {
        "too_hard": "the prompts are too hard: train the supervised stage for longer, or raise train.responses or "
        "train.temperature",
        "too_easy": "the prompts are too easy: hold out other targets (corpus.rl_holdout), set "
        "train.prompt_curriculum, or raise train.temperature",
        "alike": "raise train.responses or train.temperature",
    }
    failures = [failure for _, scores in scored for failure in scores.failures]
    if unscored == total and failures:
        return f"none of {total} groups could be scored; the first failure: {failures[0]}"
    most = max(shares, key=lambda name: shares[name])
    return (
        f"no group of {total} in {rounds} rounds had any variance in its rewards ({shares['too_hard']:.0%} earned "
        f"nothing, {shares['too_easy']:.0%} hit with every response, {shares['alike']:.0%} alike in between, "
        f"{unscored} groups unscored); {remedies[most]}"
    )
