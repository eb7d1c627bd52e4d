"""The learner's ranks of the train stage: started in their bundles, and called together, each call with a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.learner import ENVIRONMENT, LearnerActor, meeting_place
from cluster.bundles import LEARNER
from cluster.placement import Placement, await_result, await_stream
from cluster.settings import Settings
from item_index.ragged import RaggedArray
from learner.weight_probe import LearnerSums, WeightProbe


@dataclass(frozen=True)
class LearnerRanks:
    """Handles of the ranks, rank 0 first, and the deadline of their calls in seconds."""

    ranks: list[Any]
    seconds: float

    def update(
        self,
        members: list[tuple[int, int]],
        advantages: RaggedArray,
        batches: Sequence[ray.ObjectRef],
        *,
        record: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """One update of the policy by all ranks; returns its metrics. `record` is as `LearnerRank.update` takes it."""
        calls = [rank.update.remote(members, advantages, *batches, record=record) for rank in self.ranks]
        return self._results(calls, "the update of learner rank")[0]

    def weight_chunks(self, chunk_bytes: int) -> list[ray.ObjectRef]:
        """References of the weights in chunks, which stay in the object store."""
        streaming = {"num_returns": "streaming"}
        streams = [rank.weight_chunks.options(**streaming).remote(chunk_bytes) for rank in self.ranks]
        chunks, *of_others = [
            await_stream(stream, f"the weights of learner rank {rank}", self.seconds)
            for rank, stream in enumerate(streams)
        ]
        for empty in of_others:  # an error of the rank is among them
            await_result(empty[-1], "the weights of another learner rank", self.seconds)
        return chunks

    def open_weight_transfer(self, backend: str, engines: list[Any], *, devices: int, bucket_bytes: int) -> None:
        """Connect all ranks with rollout engines by vLLM's own weight transfer."""
        found = self.ranks[0].free_meeting_place.remote()
        meeting = await_result(found, "the address of learner rank 0", self.seconds)
        calls = [
            rank.open_weight_transfer.remote(
                backend, engines, devices=devices, meeting_place=meeting, bucket_bytes=bucket_bytes,
                seconds=self.seconds,
            )
            for rank in self.ranks
        ]  # fmt: skip
        self._results(calls, f"the {backend} connection of learner rank")

    def send_weights(self) -> int:
        """Send the weights to the engines it is connected with; returns their version."""
        return self._results([rank.send_weights.remote() for rank in self.ranks], "the weights of learner rank")[0]

    def probe_weights(self, tokens: np.ndarray) -> WeightProbe[LearnerSums]:
        """What rank 0 says of the weights, with some tokens."""
        calls = [rank.probe_weights.remote(tokens) for rank in self.ranks]
        return self._results(calls, "the weight check of learner rank")[0]

    def save(self, folder: Path) -> None:
        """Write the policy as a checkpoint."""
        self._results(
            [rank.save.remote(str(folder.resolve())) for rank in self.ranks], "the checkpoint of learner rank"
        )

    def _results(self, calls: list[ray.ObjectRef], what: str) -> list[Any]:
        return [await_result(call, f"{what} {rank}", self.seconds) for rank, call in enumerate(calls)]


def start_learner_ranks(placement: Placement, settings: Settings, index: str, model: str) -> LearnerRanks:
    """Ranks on a checkpoint in their places, ready to update it by SRPO."""
    train, cluster = settings.train, settings.cluster
    places = [placement.options(LEARNER, rank, ENVIRONMENT) for rank in range(train.ranks)]
    meeting = None
    if train.ranks > 1:
        found = ray.remote(meeting_place).options(**{**places[0], "num_cpus": 0, "num_gpus": 0}).remote()
        meeting = await_result(found, "the address of learner rank 0", cluster.start_seconds)
    ranks = [
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
            gradient_checkpointing=train.gradient_checkpointing,
            low_rank=None if train.low_rank is None else train.low_rank.model_dump(),
        )
        for rank, place in enumerate(places)
    ]  # fmt: skip
    prepared = [
        rank.prepare_srpo.remote(
            index, train.objective.model_dump(), temperature=train.temperature,
            mini_batch_prompts=train.mini_batch_prompts, micro_batch_tokens=train.micro_batch_tokens,
            epochs=train.epochs, seed=settings.seed, measure_valid_mass=train.measure_valid_mass,
        )
        for rank in ranks
    ]  # fmt: skip
    for rank, call in enumerate(prepared):
        await_result(call, f"the start of learner rank {rank}", cluster.start_seconds)
    return LearnerRanks(ranks, cluster.call_seconds)
