"""The learner actor: a DeepSpeed rank that trains the policy by SRPO."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from transformers import AutoTokenizer

from item_index.constraint import AnswerConstraint
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from learner.engine import LearnerEngine, initialize_process_group
from learner.low_rank import LowRankSettings, add_low_rank_weights
from learner.objective import ObjectiveSettings
from learner.packed_attention import PACKED
from learner.policy import Policy, load_language_model
from learner.rollout_files import TrainedGroups, read_batch, write_batch, write_trained_groups
from learner.rollouts import RolloutBatch
from learner.srpo import GroupPolicyLearner
from learner.state_storage import fetch_files, put_files
from learner.training_state import check_training_state, manifest_name, restore_training_state, save_training_state
from learner.weight_chunks import WeightChunk
from learner.weight_probe import LearnerSums, WeightProbe

KEPT_GROUPS = "kept-groups.parquet"  # of a training state
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class LearnerRank:
    """One rank of the learner.

    Args:
        engine: arguments of `LearnerEngine`.
        rank, ranks: of all that train together; each of them is such an actor.
        meeting_place: address and port at which rank 0 listens, see `meeting_place`; None for a rank alone.
        low_rank: arguments of `LowRankSettings`, to train low-rank weights beside frozen ones; None trains all.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        version: counts the updates.
    """

    def __init__(
        self, model_folder: str, *, engine: dict[str, Any], seed: int, threads: int, rank: int = 0, ranks: int = 1,
        meeting_place: tuple[str, int] | None = None, low_rank: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False, version: int = 0,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        address, port = meeting_place or ("127.0.0.1", _free_port())
        initialize_process_group(rank=rank, world_size=ranks, address=address, port=port)
        self.model_folder = model_folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        model = load_language_model(model_folder, attention=PACKED)
        if low_rank is not None:
            model = add_low_rank_weights(model, LowRankSettings(**low_rank), known_tokens=None)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.low_rank = low_rank is not None
        self.engine = LearnerEngine(Policy(model), **engine)
        self.group_policy: GroupPolicyLearner | None = None
        self.index_version = ""
        self.version = version

    def prepare_srpo(
        self, index_folder: str, objective: dict[str, Any], *, constrained: bool = True, **settings: Any
    ) -> None:
        """Freeze the starting checkpoint as the reference and bind the constraint: a copy of it, or the base of the
        low-rank weights."""
        language_model = self.engine.engine.module.language_model
        reference = None
        if not self.low_rank:
            reference = Policy(load_language_model(self.model_folder, dtype=language_model.dtype, attention=PACKED))
        rows = language_model.config.vocab_size
        index = SemanticIdIndex.load(index_folder)
        constraint = AnswerConstraint.of(index, self.tokenizer, vocabulary_size=rows, constrained=constrained)
        self.index_version = index.version
        self.group_policy = GroupPolicyLearner(
            self.engine, reference, constraint, ObjectiveSettings(**objective), **settings
        )

    def update(
        self,
        members: np.ndarray,
        advantages: RaggedArray,
        *batches: RolloutBatch,
        record: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """One SRPO update on the groups `members`, int64 [G, 2] of batch and place in it; the version counts up.

        `advantages` has a row per member, with the float32 advantages of its responses. Every rank is called with the
        same arguments. Rank 0 keeps the groups where a `record` is given: the `file` to write, the number of the
        `step`, and the `rewards` like the advantages. Raises ValueError for rollouts under another index version.
        """
        assert self.group_policy is not None, "call prepare_srpo first"
        parts, rows_of_parts = [], []
        for number, batch in enumerate(batches):
            if batch.index_version != self.index_version:
                raise ValueError(
                    f"batch {number} was sampled under index version {batch.index_version}, and the learner has "
                    f"{self.index_version}: their allowed sets differ"
                )
            rows_of_parts.append(np.nonzero(members[:, 0] == number)[0])
            parts.append(batch.select(members[rows_of_parts[-1], 1]))
        batch, in_order = RolloutBatch.concatenate(parts), np.concatenate(rows_of_parts)
        advantages_R = advantages.select(in_order).values
        if record is not None and self.engine.rank == 0:
            rewards_R = record["rewards"].select(in_order).values
            write_trained_groups(record["file"], TrainedGroups(record["step"], batch, rewards_R, advantages_R))
        metrics = self.group_policy.update(batch, advantages_R)
        self.version += 1
        return {
            **metrics,
            "staleness": float(self.version - 1 - np.concatenate([part.weight_versions for part in parts]).mean()),
        }

    def weight_chunks(self, chunk_bytes: int) -> Iterator[WeightChunk]:
        """The weights of the current version, an object a chunk; every rank is called, and rank 0 has them."""
        yield from self.engine.weight_chunks(self.version, chunk_bytes)

    def open_weight_transfer(
        self, backend: Literal["nccl", "ipc"], engines: list[Any], *, devices: int, meeting_place: tuple[str, int],
        bucket_bytes: int, seconds: float,
    ) -> None:  # fmt: skip
        """Connect with rollout engines by vLLM's own weight transfer; every rank is called. See `weight_sender`."""
        from actors.native_weights import EngineClient, weight_sender  # imports vLLM, which takes seconds

        self.client = EngineClient(engines, devices=devices, seconds=seconds)
        self.sender = weight_sender(
            backend, self.engine, self.client, meeting_place=meeting_place, bucket_bytes=bucket_bytes
        )

    def free_meeting_place(self) -> tuple[str, int]:
        """An address of this rank's node and a port that is free there."""
        return meeting_place()

    def send_weights(self) -> int:
        """Send the weights of the current version to the engines; every rank is called. Returns the version."""
        self.client.version = self.version
        self.sender.send_weights()
        return self.version

    def probe_weights(self, tokens: np.ndarray) -> WeightProbe[LearnerSums]:
        """Sums over the weights of the current version, and what they make of some tokens; every rank is called."""
        return WeightProbe(self.version, self.engine.token_log_probabilities(tokens), self.engine.weight_sums())

    def health(self) -> tuple[str, int]:
        """Node and process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def save_state(self, location: str, kept: Sequence[tuple[int, int]] = (), *batches: RolloutBatch) -> str:
        """Write this rank's part of the training state under a location (see `learner.state_storage`); every rank is
        called.

        Rank 0 adds the groups `kept`, (batch, place in it) each, for a later step. Returns the name of the manifest.
        """
        assert self.group_policy is not None, "call prepare_srpo first"
        progress = {
            "version": self.version, "skipped_in_a_row": self.engine.skipped_in_a_row,
            "order": self.group_policy.generator.bit_generator.state,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            if kept and self.engine.rank == 0:
                parts = [batches[number].select(np.array([place])) for number, place in kept]
                write_batch(Path(folder) / KEPT_GROUPS, RolloutBatch.concatenate(parts))
            save_training_state(self.engine, folder, progress)
            put_files(folder, location)
        return manifest_name(self.engine.rank)

    def fetch_state(self, location: str) -> None:
        """Bring a state to this node and check every file of it; every rank is called, before `load_state` of any.

        Raises InputError that names the file, see `learner.training_state`.
        """
        self.fetched = tempfile.TemporaryDirectory()
        fetch_files(location, self.fetched.name)
        try:
            self.progress = check_training_state(Path(self.fetched.name), ranks=self.engine.ranks)
        except InputError as error:
            error.file = (error.file or "").replace(self.fetched.name, location)
            raise

    def load_state(self) -> int:
        """Go on from the state that was fetched; every rank is called. Returns the version of the weights."""
        assert self.group_policy is not None, "call prepare_srpo first"
        restore_training_state(self.engine, self.fetched.name)
        kept = Path(self.fetched.name) / KEPT_GROUPS
        self.kept = read_batch(kept) if kept.is_file() else None
        self.fetched.cleanup()
        self.version, self.engine.skipped_in_a_row = self.progress["version"], self.progress["skipped_in_a_row"]
        self.group_policy.generator.bit_generator.state = self.progress["order"]
        return self.version

    def kept_groups(self) -> RolloutBatch | None:
        """The groups that were kept with the state, once; None where there are none. Rank 0 is called."""
        kept, self.kept = self.kept, None
        return kept

    def save(self, folder: str) -> str:
        """Write a checkpoint that transformers and vLLM load as it is; every rank is called, and rank 0 writes."""
        self.engine.save(folder, self.tokenizer)
        return folder


def meeting_place() -> tuple[str, int]:
    """An address of the node that this runs on, and a port that is free there: where rank 0 will listen."""
    return ray.util.get_node_ip_address(), _free_port()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


LearnerActor: Any = ray.remote(LearnerRank)
