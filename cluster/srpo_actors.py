"""The actors of the SRPO loop: learner ranks, rollout engines and reward workers, placed and started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.learner_ranks import LearnerRanks
from cluster.placement import placed
from cluster.reward_pool import RewardPool
from cluster.rollout_engines import EngineCall, RolloutEngines
from cluster.settings import Settings


@dataclass(frozen=True)
class SrpoActors:
    """The actors of the loop. Weights travel in chunks of about `chunk_bytes`."""

    learner: LearnerRanks
    engines: RolloutEngines
    rewards: RewardPool
    chunk_bytes: int

    def send_weights(self) -> list[EngineCall]:
        """Learner -> rollout engines, which take them up after what they are working on.

        Through the object store the calls are under way; vLLM's own transfer has ended, and leaves no calls.
        """
        if self.engines.cluster.weight_transfer != "object_store":
            self.learner.send_weights()
            return []
        return self.engines.update_weights(self.learner.weight_chunks(self.chunk_bytes))


@contextmanager
def srpo_actors(settings: Settings, index_folder: Path, checkpoint: Path) -> Iterator[SrpoActors]:
    """Learner, rollout engines and reward workers on the checkpoint, placed and ready."""
    train, cluster = settings.train, settings.cluster
    index, model = str(index_folder.resolve()), str(checkpoint.resolve())
    with placed(
        cluster, engines=cluster.rollout_engines, learner_ranks=train.ranks, reward_workers=cluster.reward_workers
    ) as placement:
        constrained = train.constrained_rollouts
        rewards = RewardPool(placement, settings, index, model, constrained=constrained)
        rollout = RolloutEngines(placement, settings, index, model, elastic=True, constrained=constrained)
        try:
            learner = LearnerRanks(placement, settings, index, model)
            rollout.wait_until_started()
            if cluster.weight_transfer != "object_store":
                learner.open_weight_transfer(
                    cluster.weight_transfer, [engine.actor for engine in rollout.engines],
                    devices=cluster.tensor_parallel, bucket_bytes=cluster.weight_chunk_mib * 2**20,
                )  # fmt: skip
            rewards.wait_until_started()
            yield SrpoActors(learner, rollout, rewards, cluster.weight_chunk_mib * 2**20)
        finally:
            rollout.close()
            rewards.close()
