"""Mean reward on fixed validation prompts, before and after training, paired by prompt."""

from __future__ import annotations

import numpy as np

from actors.reward import ScoredResponses
from actors.rollout import prompt_seeds
from cluster.placement import await_result
from cluster.prompts import PromptSource
from cluster.settings import Settings
from cluster.srpo_actors import SrpoActors
from evaluation.metrics import paired_bootstrap
from item_index.constraint import MODES

PROBE_RESPONSES = 4


def probe(settings: Settings, source: PromptSource, actors: SrpoActors) -> dict[str, ScoredResponses]:
    """Scores of the same validation prompts with the same seeds, in each mode that is trained."""
    positions = np.random.default_rng([settings.seed, 5]).permutation(source.evaluation_positions("validation"))
    positions = positions[: settings.train.probe_prompts]
    scores: dict[str, ScoredResponses] = {}
    for mode in MODES:
        share = settings.train.reasoning_share if mode == "reasoning" else 1 - settings.train.reasoning_share
        if not len(positions) or share == 0:
            continue
        prompts = source.prompts(positions, [mode] * len(positions))
        batch = actors.generate(
            prompts, responses=PROBE_RESPONSES, seeds=prompt_seeds(settings.seed, 0, len(prompts)),
            temperature=settings.train.temperature,
        )  # fmt: skip
        scores[mode] = await_result(actors.reward.score.remote(batch), "the probe", actors.seconds)
    return scores


def compare_probes(
    before: dict[str, ScoredResponses], after: dict[str, ScoredResponses], *, seed: int
) -> dict[str, dict[str, float]]:
    """Mean rewards before and after, paired by prompt, with a 95 % bootstrap interval; per mode and over both."""
    pairs = {
        mode: tuple(scores[mode].rewards.reshape(-1, PROBE_RESPONSES).mean(axis=1) for scores in (before, after))
        for mode in before
    }
    if len(pairs) > 1:
        first, last = zip(*pairs.values(), strict=True)
        pairs["both modes"] = (np.mean(first, axis=0), np.mean(last, axis=0))
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
