"""The actors of the SRPO loop: learner, rollout engine and reward worker, placed, started and called with deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.reward import RewardActor
from cluster.learner_ranks import LearnerRanks, start_learner_ranks
from cluster.placement import await_ready, await_result, engines_placed
from cluster.progress import console
from cluster.rollout_engine import rollout_engine
from cluster.settings import Settings
from learner.rollouts import RolloutPrompts


@dataclass(frozen=True)
class SrpoActors:
    """The actors of the loop and the deadline of their calls. Weights travel in chunks of about `chunk_bytes`."""

    learner: LearnerRanks
    rollout: Any
    reward: Any
    seconds: float
    chunk_bytes: int

    def generate(self, prompts: RolloutPrompts, **arguments: Any) -> ray.ObjectRef:
        """Reference of a finished batch of rollouts, which stays in the object store."""
        batch = self.rollout.generate.remote(prompts, **arguments)
        await_ready(batch, "the rollouts", self.seconds)
        return batch

    def transfer_weights(self) -> int:
        """Learner -> object store -> rollout engine; returns the version that samples from now on."""
        chunks = self.learner.weight_chunks(self.chunk_bytes)
        call = self.rollout.update_weights.remote(chunks, seconds=self.seconds)
        return int(await_result(call, "the weight transfer", self.seconds))

    def weight_gap(self, tokens: np.ndarray) -> float:
        """Largest difference between what learner and engine give for the log-probabilities of some tokens."""
        call = self.rollout.token_log_probabilities.remote(tokens)
        sampled = await_result(call, "the weight check of the rollout engine", self.seconds)
        return float(np.abs(self.learner.token_log_probabilities(tokens) - sampled).max())


@contextmanager
def srpo_actors(settings: Settings, index_folder: Path, checkpoint: Path) -> Iterator[SrpoActors]:
    """Learner, rollout engine and reward worker on the checkpoint, placed and ready."""
    train, cluster = settings.train, settings.cluster
    index, model = str(index_folder.resolve()), str(checkpoint.resolve())
    with engines_placed(cluster, learner_ranks=train.ranks) as group:
        rollout = rollout_engine(group, settings, index, model)
        reward = RewardActor.options(num_cpus=0).remote(index, model, minimum_think_tokens=train.minimum_think_tokens)
        learner = start_learner_ranks(group, settings, index, model, first_bundle=1)
        sampler = await_result(rollout.sampler_in_use.remote(), "the rollout engine's start", cluster.start_seconds)
        console.print(f"rollout engine: sampler {sampler}")
        yield SrpoActors(learner, rollout, reward, cluster.call_seconds, cluster.weight_chunk_mib * 2**20)
