"""The actors of the SRPO loop: learner, rollout engine and reward worker, placed, started and called with deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.learner import ENVIRONMENT as LEARNER_ENVIRONMENT
from actors.learner import LearnerActor, meeting_place
from actors.reward import RewardActor
from cluster.placement import await_ready, await_result, await_stream, engines_placed, in_bundle
from cluster.progress import console
from cluster.rollout_engine import rollout_engine
from cluster.settings import Settings
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutPrompts


@dataclass(frozen=True)
class SrpoActors:
    """The actors of the loop and the deadline of their calls; `learner` are its ranks, rank 0 first. Weights travel in
    chunks of about `chunk_bytes`."""

    learner: list[Any]
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
        streaming = {"num_returns": "streaming"}
        streams = [rank.weight_chunks.options(**streaming).remote(self.chunk_bytes) for rank in self.learner]
        of_ranks = [
            await_stream(stream, f"the weights of learner rank {rank}", self.seconds)
            for rank, stream in enumerate(streams)
        ]
        for rank, chunks in enumerate(of_ranks[1:], start=1):  # empty ones; an error of the rank is among them
            await_result(chunks[-1], f"the weights of learner rank {rank}", self.seconds)
        call = self.rollout.update_weights.remote(of_ranks[0], seconds=self.seconds)
        return int(await_result(call, "the weight transfer", self.seconds))

    def weight_gap(self, tokens: np.ndarray) -> float:
        """Largest difference between what learner and engine give for the log-probabilities of some tokens."""
        calls = [rank.token_log_probabilities.remote(tokens) for rank in self.learner]
        sampled = await_result(self.rollout.token_log_probabilities.remote(tokens), "the weight check", self.seconds)
        learnt = [await_result(call, "the weight check of the learner", self.seconds) for call in calls]
        return float(np.abs(learnt[0] - sampled).max())

    def update(self, members: list[tuple[int, int]], advantages: RaggedArray, batches: list[ray.ObjectRef]) -> dict:
        """One update of the policy by all ranks; returns its metrics."""
        calls = [rank.update.remote(members, advantages, *batches) for rank in self.learner]
        metrics = {
            rank: await_result(call, f"the update of learner rank {rank}", self.seconds)
            for rank, call in enumerate(calls)
        }
        return metrics[0]

    def save(self, folder: Path) -> None:
        """Write the policy as a checkpoint."""
        calls = [rank.save.remote(str(folder.resolve())) for rank in self.learner]
        for call in calls:
            await_result(call, "saving the checkpoint", self.seconds)


@contextmanager
def srpo_actors(settings: Settings, index_folder: Path, checkpoint: Path) -> Iterator[SrpoActors]:
    """Learner, rollout engine and reward worker on the checkpoint, placed and ready."""
    train, cluster = settings.train, settings.cluster
    index, model = str(index_folder.resolve()), str(checkpoint.resolve())
    with engines_placed(cluster, learner_ranks=train.ranks) as group:
        places = [in_bundle(group, 1 + rank, cluster, LEARNER_ENVIRONMENT) for rank in range(train.ranks)]
        meeting = None
        if train.ranks > 1:
            found = ray.remote(meeting_place).options(**{**places[0], "num_cpus": 0, "num_gpus": 0}).remote()
            meeting = await_result(found, "the address of learner rank 0", cluster.start_seconds)
        learner = [
            LearnerActor.options(**place).remote(
                model,
                engine={
                    "learning_rate": train.learning_rate, "weight_decay": train.weight_decay,
                    "warm_up_steps": train.warm_up_steps, "total_steps": train.steps, "schedule": "constant",
                    "gradient_clip": train.gradient_clip, "zero_stage": train.zero_stage, "dtype": train.dtype,
                    "offload_optimizer": train.offload_optimizer,
                    "maximum_skipped_steps": train.maximum_skipped_steps,
                },
                seed=settings.seed, threads=cluster.threads, rank=rank, ranks=train.ranks, meeting_place=meeting,
                low_rank=None if train.low_rank is None else train.low_rank.model_dump(),
            )
            for rank, place in enumerate(places)
        ]  # fmt: skip
        rollout = rollout_engine(group, settings, index, model)
        reward = RewardActor.options(num_cpus=0).remote(index, model, minimum_think_tokens=train.minimum_think_tokens)
        prepared = [
            rank.prepare_srpo.remote(
                index, train.objective.model_dump(), temperature=train.temperature,
                mini_batch_prompts=train.mini_batch_prompts, micro_batch_tokens=train.micro_batch_tokens,
                epochs=train.epochs, seed=settings.seed, measure_valid_mass=train.measure_valid_mass,
            )
            for rank in learner
        ]  # fmt: skip
        for rank, call in enumerate(prepared):
            await_result(call, f"the start of learner rank {rank}", cluster.start_seconds)
        sampler = await_result(rollout.sampler_in_use.remote(), "the rollout engine's start", cluster.start_seconds)
        console.print(f"rollout engine: sampler {sampler}")
        yield SrpoActors(learner, rollout, reward, cluster.call_seconds, cluster.weight_chunk_mib * 2**20)
