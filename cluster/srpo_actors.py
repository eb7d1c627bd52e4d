"""The actors of the SRPO loop: learner, rollout engine and reward worker, placed, started and called with deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.learner import ENVIRONMENT as LEARNER_ENVIRONMENT
from actors.learner import LearnerActor
from actors.reward import RewardActor
from actors.rollout import ENVIRONMENT as ROLLOUT_ENVIRONMENT
from actors.rollout import RolloutActor
from cluster.placement import await_ready, await_result, engines_placed, in_bundle
from cluster.settings import Settings
from learner.rollouts import RolloutPrompts


@dataclass(frozen=True)
class SrpoActors:
    """The three actors of the loop and the deadline of their calls."""

    learner: Any
    rollout: Any
    reward: Any
    seconds: float

    def generate(self, prompts: RolloutPrompts, **arguments: Any) -> ray.ObjectRef:
        """Reference of a finished batch of rollouts, which stays in the object store."""
        batch = self.rollout.generate.remote(prompts, **arguments)
        await_ready(batch, "the rollouts", self.seconds)
        return batch

    def transfer_weights(self) -> int:
        """Learner -> object store -> rollout engine; returns the version that samples from now on."""
        exported = self.learner.exported_weights.options(num_returns=2).remote()
        version = await_result(self.rollout.update_weights.remote(*exported), "the weight transfer", self.seconds)
        return int(version)


@contextmanager
def srpo_actors(settings: Settings, index_folder: Path, checkpoint: Path) -> Iterator[SrpoActors]:
    """Learner, rollout engine and reward worker on the checkpoint, placed and ready."""
    train, cluster = settings.train, settings.cluster
    index, model = str(index_folder.resolve()), str(checkpoint.resolve())
    with engines_placed(cluster) as group:
        learner = LearnerActor.options(**in_bundle(group, 0, cluster, LEARNER_ENVIRONMENT)).remote(
            model,
            engine={
                "learning_rate": train.learning_rate, "weight_decay": train.weight_decay,
                "warm_up_steps": train.warm_up_steps, "total_steps": train.steps, "schedule": "constant",
                "gradient_clip": train.gradient_clip, "zero_stage": train.zero_stage,
            },
            seed=settings.seed, threads=cluster.threads,
        )  # fmt: skip
        rollout = RolloutActor.options(**in_bundle(group, 1, cluster, ROLLOUT_ENVIRONMENT)).remote(
            model, index, dtype=cluster.dtype, kv_cache_mib=cluster.kv_cache_mib, sequences=cluster.rollout_sequences,
            threads=cluster.threads, seed=settings.seed,
        )  # fmt: skip
        reward = RewardActor.options(num_cpus=0).remote(index, model, minimum_think_tokens=train.minimum_think_tokens)
        prepared = learner.prepare_srpo.remote(
            index, train.objective.model_dump(), temperature=train.temperature,
            mini_batch_prompts=train.mini_batch_prompts, micro_batch_tokens=train.micro_batch_tokens,
            seed=settings.seed,
        )  # fmt: skip
        await_result(prepared, "the learner's start", cluster.start_seconds)
        await_result(rollout.weight_version.remote(), "the rollout engine's start", cluster.start_seconds)
        yield SrpoActors(learner, rollout, reward, cluster.call_seconds)
