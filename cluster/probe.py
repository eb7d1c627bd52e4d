"""Mean reward on fixed validation prompts, before and after training, paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from actors.reward import ScoredResponses
from actors.rollout import prompt_seeds
from cluster.prompts import PromptSource
from cluster.reward_pool import RewardPool
from cluster.rollout_engines import EngineCall, RolloutEngines, prompt_order
from cluster.settings import Settings
from cluster.srpo_actors import SrpoActors
from evaluation.metrics import paired_bootstrap
from item_index.constraint import MODES

PROBE_RESPONSES = 4


@dataclass(frozen=True)
class ProbeScores:
    """What is kept of a probe in one mode: arrays [R], group after group, as in `ScoredResponses`."""

    rewards: np.ndarray
    hits: np.ndarray
    valid: np.ndarray
    well_formed: np.ndarray

    def state(self) -> dict[str, list]:
        """As JSON."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @staticmethod
    def of(state: dict[str, list]) -> ProbeScores:
        """What `state` gave."""
        flags = {name: np.array(state[name], bool) for name in ("hits", "valid", "well_formed")}
        return ProbeScores(rewards=np.array(state["rewards"], np.float32), **flags)


Scores = dict[str, ProbeScores]  # by mode


def probe(settings: Settings, source: PromptSource, actors: SrpoActors) -> Scores:
    """Scores of the same validation prompts with the same seeds, in each mode that is trained."""
    positions = np.random.default_rng([settings.seed, 5]).permutation(source.evaluation_positions("validation"))
    positions = positions[: settings.train.probe_prompts]
    scores: Scores = {}
    for mode in MODES:
        share = settings.train.reasoning_share if mode == "reasoning" else 1 - settings.train.reasoning_share
        if not len(positions) or share == 0:
            continue
        prompts = source.prompts(positions, [mode] * len(positions))
        calls = actors.engines.generate(
            prompts, responses=PROBE_RESPONSES, seeds=prompt_seeds(settings.seed, 0, len(prompts)),
            temperature=settings.train.temperature,
        )  # fmt: skip
        scored = scored_in_order(actors.engines, actors.rewards, calls, responses=PROBE_RESPONSES)
        scores[mode] = ProbeScores(scored.rewards, scored.hits, scored.valid, scored.well_formed)
    return scores


def scored_in_order(
    engines: RolloutEngines, rewards: RewardPool, calls: Sequence[EngineCall], *, responses: int
) -> ScoredResponses:
    """Wait for generations; their scores in the order of the prompts."""
    engines.wait(calls)
    scores = rewards.score(
        [call.references[0] for call in calls], [len(call.prompts) for call in calls], responses=responses
    )
    return ScoredResponses.concatenate(scores).select(prompt_order(calls))


def mean_rewards(scores: Scores) -> dict[str, float]:
    """Mean reward by mode, over the prompts that could be scored."""
    return {mode: float(np.nanmean(of_mode.rewards)) for mode, of_mode in scores.items()}


def compare_probes(before: Scores, after: Scores, *, seed: int) -> dict[str, dict[str, float]]:
    """Mean rewards before and after, paired by prompt, with a 95 % bootstrap interval; per mode and over both.

    Prompts that could not be scored either time are left out.
    """
    pairs: dict[str, Any] = {
        mode: tuple(scores[mode].rewards.reshape(-1, PROBE_RESPONSES).mean(axis=1) for scores in (before, after))
        for mode in before
    }
    if len(pairs) > 1:
        first, last = zip(*pairs.values(), strict=True)
        pairs["both modes"] = (np.mean(first, axis=0), np.mean(last, axis=0))
    pairs = {mode: np.stack(pair)[:, ~np.isnan(pair).any(axis=0)] for mode, pair in pairs.items()}
    report = {}
    for mode, (first, last) in pairs.items():
        difference, low, high = paired_bootstrap(first, last, seed=seed)
        report[mode] = {
            "prompts": len(first), "before": float(first.mean()), "after": float(last.mean()),
            "difference": difference, "low": low, "high": high,
        }  # fmt: skip
        if mode in after:
            report[mode]["valid_rate"] = float(after[mode].valid.mean())
            report[mode]["well_formed_rate"] = float(after[mode].well_formed.mean())
            report[mode]["hit_rate_before"] = float(before[mode].hits.mean())
            report[mode]["hit_rate_after"] = float(after[mode].hits.mean())
    return report
