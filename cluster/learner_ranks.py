"""The learner's ranks of the train stage: started in their bundles, and called together, each call with a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.learner import ENVIRONMENT, LearnerActor, meeting_place
from cluster.bundles import LEARNER
from cluster.placement import (
    DeadlineExceeded,
    Placement,
    WorkLost,
    await_ready,
    await_result,
    await_stream,
    lost,
    lost_what,
)
from cluster.settings import Settings
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from learner.weight_probe import LearnerSums, WeightProbe

PEER_SECONDS = 10.0  # after a rank failed: for the death of another to be known


class LearnerRanks:
    """`train.ranks` ranks on a checkpoint in their places, ready to update it by SRPO.

    A rank that dies or is late takes the others with it: WorkLost is raised, and after `restart` the ranks are new
    processes on the checkpoint that they began with. Calls have the deadline `cluster.call_seconds`.

    Attributes:
        ranks: handles, rank 0 first.
        restarts: how often they were started anew.
    """

    def __init__(self, placement: Placement, settings: Settings, index: str, model: str) -> None:
        self.placement, self.settings, self.index, self.model = placement, settings, index, model
        self.seconds = settings.cluster.call_seconds
        self.restarts = 0
        self.ranks: list[Any] = []
        self._start()

    def restart(self) -> None:
        """End all ranks and start new ones on the checkpoint that they began with."""
        self.restarts += 1
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        self._start()

    def update(
        self,
        members: np.ndarray,
        advantages: RaggedArray,
        batches: Sequence[ray.ObjectRef],
        *,
        record: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """One update of the policy by all ranks; returns its metrics. Arguments are as `LearnerRank.update` takes them,
        the batches as references."""
        shared = ray.put(members), ray.put(advantages)  # once, for all ranks
        calls = [rank.update.remote(*shared, *batches, record=record) for rank in self.ranks]
        return self._results(calls, "the update")[0]

    def weight_chunks(self, chunk_bytes: int) -> list[ray.ObjectRef]:
        """References of the weights in chunks, which stay in the object store."""
        streaming = {"num_returns": "streaming"}
        streams = [rank.weight_chunks.options(**streaming).remote(chunk_bytes) for rank in self.ranks]
        try:
            chunks, *of_others = [
                await_stream(stream, f"the weights of learner rank {rank}", self.seconds)
                for rank, stream in enumerate(streams)
            ]
            for empty in of_others:  # an error of the rank is among them
                await_result(empty[-1], "the weights of another learner rank", self.seconds)
        except (ray.exceptions.RayError, DeadlineExceeded) as error:
            raise self._lost("the weights", error) from error
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
        self._results(calls, f"the {backend} connection")

    def send_weights(self) -> int:
        """Send the weights to the engines it is connected with; returns their version."""
        return self._results([rank.send_weights.remote() for rank in self.ranks], "the weights")[0]

    def probe_weights(self, tokens: np.ndarray) -> WeightProbe[LearnerSums]:
        """What rank 0 says of the weights, with some tokens."""
        return self._results([rank.probe_weights.remote(tokens) for rank in self.ranks], "the weight check")[0]

    def save(self, folder: Path) -> None:
        """Write the policy as a checkpoint."""
        self._results([rank.save.remote(str(folder.resolve())) for rank in self.ranks], "the checkpoint")

    def save_state(self, location: str, groups: Sequence[tuple[ray.ObjectRef, int]] = ()) -> list[str]:
        """Write the ranks' parts of a training state; returns the names of their manifests.

        Args:
            location: folder that all nodes see, or URI.
            groups: to be kept with it, each a place in a batch.
        """
        batches = list({batch: None for batch, _ in groups})
        number = {batch: place for place, batch in enumerate(batches)}
        kept = [(number[batch], place) for batch, place in groups]
        calls = [rank.save_state.remote(location, kept, *batches) for rank in self.ranks]
        return self._results(calls, "the training state")

    def load_state(self, location: str) -> int:
        """Go on from a training state; returns the version of the weights. Raises InputError that names the file at
        fault, and the ranks are as they were then."""
        self._results([rank.fetch_state.remote(location) for rank in self.ranks], "the look at the training state")
        return self._results([rank.load_state.remote() for rank in self.ranks], "the training state")[0]

    def kept_groups(self) -> ray.ObjectRef:
        """Reference of the groups that were kept with the state; they stay in the object store."""
        call = self.ranks[0].kept_groups.remote()
        await_ready(call, "the kept groups of learner rank 0", self.seconds)
        return call

    def _results(self, calls: list[ray.ObjectRef], what: str) -> list[Any]:
        """What all ranks answer. The first to fail decides: the others may wait for it in a collective for long."""
        number = {call: rank for rank, call in enumerate(calls)}
        pending, deadline = list(calls), time.monotonic() + self.seconds
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()), fetch_local=False)
            if not ready:
                late = ", ".join(str(number[call]) for call in pending)
                raise WorkLost(
                    f"{what} of learner rank {late} did not arrive within {self.seconds:.0f} s (cluster.call_seconds)"
                )
            for call in ready:
                try:
                    ray.get(call, timeout=self.seconds)
                except ray.exceptions.RayError as error:
                    raise self._failure(f"{what} of learner rank {number[call]}", error, pending) from error
        return ray.get(calls, timeout=self.seconds)

    def _failure(self, what: str, error: ray.exceptions.RayError, pending: list[ray.ObjectRef]) -> Exception:
        """The error to raise: WorkLost where a process is gone, the rank's own error otherwise. A rank whose peer has
        died says that a connection was closed, so the others are looked at as well."""
        if lost(error):
            return WorkLost(f"{what}: {lost_what(error)}")
        cause = getattr(error, "cause", error)
        if isinstance(cause, InputError):
            return cause
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=PEER_SECONDS, fetch_local=False)
        for rank, handle in enumerate(self.ranks):
            try:
                answered, _ = ray.wait([handle.health.remote()], timeout=PEER_SECONDS)
                ray.get(answered, timeout=PEER_SECONDS)
            except ray.exceptions.RayActorError as death:
                return WorkLost(f"{what}: {cause}; learner rank {rank} is gone: {lost_what(death)}")
        return RuntimeError(f"{what}: {cause}")

    def _lost(self, what: str, error: Exception) -> Exception:
        if isinstance(error, DeadlineExceeded) or lost(error):
            return WorkLost(f"{what} of the learner: {lost_what(error)}")
        return error

    def _start(self) -> None:
        train, cluster = self.settings.train, self.settings.cluster
        places = [self.placement.options(LEARNER, rank, ENVIRONMENT) for rank in range(train.ranks)]
        meeting = None
        if train.ranks > 1:
            found = ray.remote(meeting_place).options(**{**places[0], "num_cpus": 0, "num_gpus": 0}).remote()
            meeting = await_result(found, "the address of learner rank 0", cluster.start_seconds)
        self.ranks = [
            LearnerActor.options(**place).remote(
                self.model,
                engine={
                    "learning_rate": train.learning_rate, "weight_decay": train.weight_decay,
                    "warm_up_steps": train.warm_up_steps, "total_steps": train.optimizer_steps,
                    "schedule": train.learning_rate_schedule,
                    "gradient_clip": train.gradient_clip, "zero_stage": train.zero_stage, "dtype": train.dtype,
                    "offload_optimizer": train.offload_optimizer,
                    "maximum_skipped_steps": train.maximum_skipped_steps,
                },
                seed=self.settings.seed, threads=cluster.threads, rank=rank, ranks=train.ranks, meeting_place=meeting,
                gradient_checkpointing=train.gradient_checkpointing,
                low_rank=None if train.low_rank is None else train.low_rank.model_dump(),
            )
            for rank, place in enumerate(places)
        ]  # fmt: skip
        prepared = [
            rank.prepare_srpo.remote(
                self.index, train.objective.model_dump(), temperature=train.temperature,
                mini_batch_prompts=train.mini_batch_prompts, micro_batch_tokens=train.micro_batch_tokens,
                epochs=train.epochs, seed=self.settings.seed, measure_valid_mass=train.measure_valid_mass,
                constrained=train.constrained_rollouts,
            )
            for rank in self.ranks
        ]  # fmt: skip
        for rank, call in enumerate(prepared):
            await_result(call, f"the start of learner rank {rank}", cluster.start_seconds)
