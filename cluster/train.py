"""The SRPO loop (section 3): one flat step of rollouts, rewards, advantages, update and weight transfer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from actors.reward import ScoredResponses
from cluster.progress import console
from cluster.prompts import PromptSource
from cluster.rollout_scheduler import RolloutScheduler, ScoredGroup, alike_groups, has_variance
from cluster.settings import Settings
from cluster.srpo_actors import SrpoActors
from cluster.timers import Timers
from cluster.weight_check import WeightCheck
from item_index.constraint import MODES
from item_index.ragged import RaggedArray
from learner.advantages import group_advantages
from rewards.chains import chain_metrics

FAILURES_SHOWN = 3
Scored = list[tuple[np.ndarray, ScoredResponses]]  # mode flags of groups, and their scores


class SrpoLoop:
    """The state of the loop between steps: the version of the policy, and what engines and scheduler have under way.

    Attributes:
        groups: that the latest step trained on.
    """

    def __init__(self, settings: Settings, source: PromptSource, actors: SrpoActors) -> None:
        self.settings, self.source, self.actors = settings, source, actors
        self.timers = Timers()
        self.scheduler = RolloutScheduler(settings, source, actors.engines, actors.rewards, self.timers)
        self.dumps = (settings.folder / "rollouts").resolve()
        self.groups: list[ScoredGroup] = []
        self.version = 0
        self.ever_compared = False
        self.weight_check: WeightCheck | None = None
        self.compared = {"weight_gap": 0.0, "weights_compared": 0.0}

    def state(self) -> dict[str, Any]:
        """All that is needed to go on after the latest step, as JSON, beside the learner's own state and the groups of
        `scheduler.surplus`."""
        return {"version": self.version, "scheduler": self.scheduler.state()}

    def restore(self, state: dict[str, Any], surplus: ray.ObjectRef | None) -> None:
        """Go on where a loop was when it gave its `state`; engines and learner have its weights already."""
        self.version = state["version"]
        self.ever_compared, self.weight_check = False, None
        self.scheduler.restore(state["scheduler"], surplus)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its metrics, seconds by phase among them."""
        train, actors, timers = self.settings.train, self.actors, self.timers
        started = time.perf_counter()
        self.groups = []  # their rollouts need not stay in the object store
        batch = self.scheduler.groups_for(step, self.version)
        self.scheduler.run_ahead(step)
        show_failures(batch.scored)

        rewards = RaggedArray.of([group.rewards for group in batch.groups], np.float32)
        advantages_R = group_advantages(
            torch.from_numpy(rewards.values),
            torch.from_numpy(np.concatenate([group.hits for group in batch.groups])),
            torch.from_numpy(rewards.lengths),
            train.advantages,
            k=train.pass_k,
        )
        with timers("learner"):
            batches = list({group.batch: None for group in batch.groups})
            number = {reference: place for place, reference in enumerate(batches)}
            members = np.array([(number[group.batch], group.place) for group in batch.groups], np.int64)
            record = None
            if train.dump_rollouts:
                record = {"file": str(self.dumps / f"step-{step:06d}.parquet"), "step": step, "rewards": rewards}
            advantages = RaggedArray(advantages_R.numpy(), rewards.offsets)
            learnt = actors.learner.update(members, advantages, batches, record=record)
            self.version += 1
            self.groups = batch.groups
        with timers("weights"):
            transfer = actors.send_weights()
            if train.max_staleness == 0:
                actors.engines.wait(transfer)
        with timers("weight check"):
            self.check_weights(step)
        total = time.perf_counter() - started
        responses = sum(scores.rewards.size for _, scores in batch.scored)
        return {
            **rollout_metrics(
                batch.scored, minimum_think_tokens=train.minimum_think_tokens, terms=actors.rewards.terms
            ),
            **{f"learner/{name}": value for name, value in learnt.items()},
            **batch.metrics,
            **{f"groups/{name}": share for name, share in alike_groups(batch.scored).items()},
            "weight_version": float(self.version),
            **self.compared,
            "rollout_engines": float(len(actors.engines.engines)),
            "engine_restarts": float(actors.engines.restarts),
            "learner_restarts": float(actors.learner.restarts),
            **{f"seconds/{phase}": seconds for phase, seconds in timers.read().items()},
            "seconds/step": total,
            "responses_per_second": responses / total,
        }

    def check_weights(self, step: int) -> None:
        """After the first step of this process and every `train.weight_check_steps`: compare sums over all weights,
        and what learner and engines make of a prompt and its true answer. Engines that work ahead are compared when
        they have answered."""
        train, engines = self.settings.train, self.actors.engines
        if self.weight_check is None and (not self.ever_compared or step % train.weight_check_steps == 0):
            self.ever_compared = True
            prompt = self.source.prompts(self.scheduler.sampler.positions[:1], ["direct"])
            tokens = np.array([*prompt.tokens[0], *self.source.corpus.builder.item_tokens[int(prompt.targets[0])]])
            calls = engines.probe_weights(tokens)
            self.weight_check = WeightCheck(self.actors.learner.probe_weights(tokens), calls)
            if train.max_staleness == 0:
                engines.wait(calls)
        if self.weight_check is not None and self.weight_check.answered:
            self.compared, self.weight_check = self.weight_check.compare(train.weight_gap), None

    def settle(self) -> None:
        """Wait for what the engines still owe, the last weight check with it."""
        if self.weight_check is not None:
            self.actors.engines.wait(self.weight_check.calls)
            self.weight_check.compare(self.settings.train.weight_gap)


def show_failures(scored: Scored) -> None:
    """The first responses that could not be scored, with what is known of them."""
    failures = [failure for _, scores in scored for failure in scores.failures]
    for failure in failures[:FAILURES_SHOWN]:
        console.print(f"dropped a group: {failure}", style="yellow", highlight=False, markup=False)
    if len(failures) > FAILURES_SHOWN:
        console.print(f"and {len(failures) - FAILURES_SHOWN} more in this step", style="yellow")


def rollout_metrics(scored: Scored, *, minimum_think_tokens: int, terms: Sequence[str] = ()) -> dict[str, float]:
    """Means over all generated groups that could be scored, by mode, under `rewards/` those of each of several `terms`
    before its weight in the modes where it counts, and under `chains/` what the reasoning chains are made of.
    `coverage` is the number of different answers by that of answers."""
    metrics: dict[str, float] = {}
    reasoning_G = np.concatenate([flags for flags, _ in scored])

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(scores, name) for _, scores in scored])

    sizes_G, scored_G = column("group_sizes"), column("scored")
    varied_G = has_variance([scores for _, scores in scored])
    known = np.repeat(scored_G, sizes_G)
    reasoning, rewards = np.repeat(reasoning_G, sizes_G), column("rewards")
    metrics["reward"] = float(rewards[known].mean())
    if len(terms) > 1:
        for term, values in zip(terms, column("components")[known].T, strict=True):
            counted = values[np.isfinite(values)]  # of the modes that the term counts in
            metrics |= {f"rewards/{term}": float(counted.mean())} if len(counted) else {}
    metrics["valid_rate"] = float(column("valid").mean())
    items = column("items")
    metrics["coverage"] = len(np.unique(items[items >= 0])) / max(int((items >= 0).sum()), 1)
    for flag, mode in enumerate(MODES):
        rows = (reasoning == bool(flag)) & known
        if not rows.any():
            continue
        metrics[f"{mode}/reward"] = float(rewards[rows].mean())
        metrics[f"{mode}/hit_rate"] = float(column("hits")[rows].mean())
        metrics[f"{mode}/valid_rate"] = float(column("valid")[rows].mean())
        metrics[f"{mode}/well_formed_rate"] = float(column("well_formed")[rows].mean())
        metrics[f"{mode}/response_tokens"] = float(column("lengths")[rows].mean())
        metrics[f"{mode}/groups_with_variance"] = float(varied_G[(reasoning_G == bool(flag)) & scored_G].mean())
    metrics["forced_close_rate"] = float(column("forced")[reasoning].mean()) if reasoning.any() else 0.0
    chains = chain_metrics(column("chains")[reasoning], minimum_think_tokens=minimum_think_tokens)
    return metrics | {f"chains/{name}": value for name, value in chains.items()}
