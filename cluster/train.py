"""The SRPO stage (section 3): one flat loop of rollouts, rewards, advantages, update and weight transfer."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from actors.reward import ScoredResponses
from actors.rollout import prompt_seeds
from cluster.placement import await_result, ray_session
from cluster.probe import compare_probes, probe
from cluster.progress import console, progress_bar
from cluster.prompts import PromptSource
from cluster.settings import Settings
from cluster.srpo_actors import SrpoActors, srpo_actors
from cluster.tracking import Tracker
from curriculum.corpus import Corpus
from item_index.constraint import MODES
from item_index.ragged import RaggedArray
from learner.advantages import group_advantages, groups_with_variance
from rewards.chains import chain_metrics


@dataclass(frozen=True)
class ScoredGroup:
    """A group that has variance and waits to be trained on; the rollouts themselves stay in the object store."""

    batch: ray.ObjectRef
    place: int
    reasoning: bool
    weight_version: int
    rewards: np.ndarray
    hits: np.ndarray


class Timers:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started


def run_train(
    settings: Settings, corpus: Corpus, index_folder: Path, sft_checkpoint: Path, folder: Path, tracker: Tracker
):
    """Post-train the supervised checkpoint; the result is `folder/checkpoint`, the probes are `folder/probe.json`."""
    train = settings.train
    for outdated in (settings.folder / "rollouts").glob("step-*.parquet"):
        outdated.unlink()
    source = PromptSource(corpus, reasoning_budget=train.reasoning_budget, exclude_seen=train.exclude_seen)
    with ray_session(settings.cluster), srpo_actors(settings, index_folder, sft_checkpoint) as actors:
        before = probe(settings, source, actors)
        loop = SrpoLoop(settings, source, actors)
        with progress_bar("train", train.steps) as bar:
            for step in range(1, train.steps + 1):
                metrics = loop.step(step)
                tracker.metrics({f"train/{name}": value for name, value in metrics.items()}, step)
                bar.advance(reward=metrics["reward"], direct=metrics.get("direct/reward", math.nan),
                            reasoning=metrics.get("reasoning/reward", math.nan))  # fmt: skip
        after = probe(settings, source, actors)
        actors.learner.save(folder / "checkpoint")
    report = compare_probes(before, after, seed=settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe.json").write_text(json.dumps(report, indent=2))
    for mode, values in report.items():
        console.print(
            f"train: mean reward on {values['prompts']} validation prompts, {mode}: {values['before']:.4f} -> "
            f"{values['after']:.4f} (difference {values['difference']:+.4f}, 95 % interval "
            f"{values['low']:+.4f} .. {values['high']:+.4f})"
        )
        tracker.metrics({f"probe/{mode}/{name}": value for name, value in values.items()}, train.steps)
    return report


class SrpoLoop:
    """The state of the loop between steps: the order of prompts and the surplus groups."""

    def __init__(self, settings: Settings, source: PromptSource, actors: SrpoActors) -> None:
        self.settings, self.source, self.actors = settings, source, actors
        positions = source.reinforcement_positions(settings.corpus.minimum_history)
        self.generator = np.random.default_rng([settings.seed, 4])
        self.positions, self.drawn = self.generator.permutation(positions), 0
        self.surplus: list[ScoredGroup] = []
        self.dumps = (settings.folder / "rollouts").resolve()
        self.version = 0
        self.weight_gap = 0.0
        self.kept_share = {False: 1.0, True: 1.0}
        self.prompts_made = 0

    def draw(self, count: int) -> np.ndarray:
        """The next positions, in a new order after every pass over all of them."""
        chosen: list[np.ndarray] = []
        while count > 0:
            if self.drawn == len(self.positions):
                self.positions, self.drawn = self.generator.permutation(self.positions), 0
            part = self.positions[self.drawn : self.drawn + count]
            self.drawn += len(part)
            count -= len(part)
            chosen.append(part)
        return np.concatenate(chosen)

    def check_weights(self) -> None:
        """Compare what learner and engine make of a prompt and its true answer. Raises RuntimeError where they differ
        by more than the types' precision explains."""
        prompt = self.source.prompts(self.positions[:1], ["direct"])
        answer = self.source.corpus.builder.item_tokens[int(prompt.targets[0])]
        self.weight_gap = self.actors.weight_gap(np.array([*prompt.tokens[0], *answer]))
        if self.weight_gap > self.settings.train.weight_gap:
            raise RuntimeError(
                f"with weights of version {self.version} the rollout engine's log-probabilities differ from the "
                f"learner's by {self.weight_gap:.3g}, more than train.weight_gap: it samples from other weights"
            )

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its metrics, seconds by phase among them."""
        train, actors = self.settings.train, self.actors
        started, timers = time.perf_counter(), Timers()
        quota = {True: round(train.reasoning_share * train.prompts_per_step)}
        quota[False] = train.prompts_per_step - quota[True]
        fresh_enough = self.version - train.maximum_staleness
        groups = [group for group in self.surplus if group.weight_version >= fresh_enough]
        expired = len(self.surplus) - len(groups)
        scored: list[tuple[np.ndarray, ScoredResponses]] = []

        # Dynamic sampling: groups without variance teach nothing, so more are generated until the batch is full.
        for _round in range(train.generation_rounds):
            missing = {mode: quota[mode] - sum(group.reasoning == mode for group in groups) for mode in quota}
            wanted = {mode: math.ceil(n / max(self.kept_share[mode], 0.25)) for mode, n in missing.items() if n > 0}
            if not wanted:
                break
            modes = [MODES[int(mode)] for mode, count in wanted.items() for _ in range(count)]
            prompts = self.source.prompts(self.draw(len(modes)), modes)
            seeds = prompt_seeds(self.settings.seed, step, len(prompts), self.prompts_made)
            self.prompts_made += len(prompts)
            with timers("rollouts"):
                batch = actors.generate(prompts, responses=train.responses, seeds=seeds, temperature=train.temperature)
            with timers("rewards"):
                scores: ScoredResponses = await_result(actors.reward.score.remote(batch), "the rewards", actors.seconds)
            scored.append((prompts.reasoning, scores))
            varied = groups_with_variance(torch.tensor(scores.rewards), torch.tensor(scores.group_sizes)).numpy()
            ends = np.cumsum(scores.group_sizes)[:-1]
            rewards_of, hits_of = np.split(scores.rewards, ends), np.split(scores.hits, ends)
            for mode in wanted:
                self.kept_share[mode] = float(varied[prompts.reasoning == mode].mean())
            groups += [
                ScoredGroup(batch, int(place), bool(prompts.reasoning[place]), self.version, rewards_of[place],
                            hits_of[place])
                for place in np.nonzero(varied)[0]
            ]  # fmt: skip
        chosen = [
            group for mode in quota for group in [group for group in groups if group.reasoning == mode][: quota[mode]]
        ]
        self.surplus = [group for group in groups if not any(group is taken for taken in chosen)]
        if not chosen:
            raise RuntimeError(
                f"step {step}: no group of {sum(len(r) for r, _ in scored)} had any variance in its rewards; "
                "raise train.responses or train.temperature, or train the supervised stage for longer"
            )

        rewards = RaggedArray.of([group.rewards for group in chosen], np.float32)
        advantages_R = group_advantages(
            torch.from_numpy(rewards.values),
            torch.from_numpy(np.concatenate([group.hits for group in chosen])),
            torch.from_numpy(rewards.lengths),
            train.advantages,
            k=train.pass_k,
        )
        with timers("learner"):
            batches = list({group.batch: None for group in chosen})
            number = {batch: place for place, batch in enumerate(batches)}
            members = [(number[group.batch], group.place) for group in chosen]
            record = None
            if train.dump_rollouts:
                record = {"file": str(self.dumps / f"step-{step:06d}.parquet"), "step": step, "rewards": rewards}
            advantages = RaggedArray(advantages_R.numpy(), rewards.offsets)
            learnt = actors.learner.update(members, advantages, batches, record=record)
        with timers("weights"):
            self.version = actors.transfer_weights()
            if step == 1 or step % train.weight_check_steps == 0:
                self.check_weights()
        total = time.perf_counter() - started
        responses = sum(scores.rewards.size for _, scores in scored)
        return {
            **rollout_metrics(scored, minimum_think_tokens=train.minimum_think_tokens),
            **{f"learner/{name}": value for name, value in learnt.items()},
            "groups_generated": float(sum(len(reasoning) for reasoning, _ in scored)),
            "groups_trained": float(len(chosen)),
            "groups_kept_for_later": float(len(self.surplus)),
            "groups_expired": float(expired),
            "weight_version": float(self.version),
            "weight_gap": self.weight_gap,
            **{f"seconds/{phase}": seconds for phase, seconds in timers.seconds.items()},
            "seconds/step": total,
            "responses_per_second": responses / total,
        }


def rollout_metrics(scored: list[tuple[np.ndarray, ScoredResponses]], *, minimum_think_tokens: int) -> dict[str, float]:
    """Means over all generated groups, by mode, and under `chains/` what the reasoning chains are made of."""
    metrics: dict[str, float] = {}
    reasoning_G = np.concatenate([flags for flags, _ in scored])

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(scores, name) for _, scores in scored])

    rewards, sizes_G = column("rewards"), column("group_sizes")
    reasoning = np.repeat(reasoning_G, sizes_G)
    varied_G = groups_with_variance(torch.from_numpy(rewards), torch.from_numpy(sizes_G)).numpy()
    metrics["reward"] = float(rewards.mean())
    metrics["valid_rate"] = float(column("valid").mean())
    for flag, mode in enumerate(MODES):
        rows = reasoning == bool(flag)
        if not rows.any():
            continue
        metrics[f"{mode}/reward"] = float(rewards[rows].mean())
        metrics[f"{mode}/hit_rate"] = float(column("hits")[rows].mean())
        metrics[f"{mode}/valid_rate"] = float(column("valid")[rows].mean())
        metrics[f"{mode}/well_formed_rate"] = float(column("well_formed")[rows].mean())
        metrics[f"{mode}/response_tokens"] = float(column("lengths")[rows].mean())
        metrics[f"{mode}/groups_with_variance"] = float(varied_G[reasoning_G == bool(flag)].mean())
    metrics["forced_close_rate"] = float(column("forced")[reasoning].mean()) if reasoning.any() else 0.0
    chains = chain_metrics(column("chains")[reasoning], minimum_think_tokens=minimum_think_tokens)
    return metrics | {f"chains/{name}": value for name, value in chains.items()}
