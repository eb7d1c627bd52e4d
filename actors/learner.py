"""The learner actor: a DeepSpeed rank that trains the policy by SRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoTokenizer

from item_index.constraint import AnswerConstraint
from item_index.semantic_ids import SemanticIdIndex
from learner.engine import LearnerEngine, initialize_process_group
from learner.objective import ObjectiveSettings
from learner.packed_attention import PACKED
from learner.policy import Policy, load_language_model
from learner.rollouts import RolloutBatch
from learner.srpo import GroupPolicyLearner

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class LearnerRank:
    """One rank of the learner. `engine` holds the arguments of `LearnerEngine`; `version` counts the updates."""

    def __init__(self, model_folder: str, *, engine: dict[str, Any], seed: int, threads: int, version: int = 0) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        initialize_process_group(port=_free_port())
        self.model_folder = model_folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        self.engine = LearnerEngine(Policy(load_language_model(model_folder, attention=PACKED)), **engine)
        self.group_policy: GroupPolicyLearner | None = None
        self.version = version

    def prepare_srpo(self, index_folder: str, objective: dict[str, Any], **settings: Any) -> None:
        """Freeze a copy of the starting checkpoint as the reference and bind the constraint."""
        reference = load_language_model(self.model_folder, attention=PACKED)
        rows = reference.get_output_embeddings().weight.shape[0]
        constraint = AnswerConstraint.of(SemanticIdIndex.load(index_folder), self.tokenizer, vocabulary_size=rows)
        self.group_policy = GroupPolicyLearner(
            self.engine, Policy(reference), constraint, ObjectiveSettings(**objective), **settings
        )

    def update(
        self, members: Sequence[tuple[int, int]], advantages_GN: np.ndarray, *batches: RolloutBatch
    ) -> dict[str, float]:
        """One SRPO update on the groups `members`, (batch, place in it) each; the version counts up."""
        assert self.group_policy is not None, "call prepare_srpo first"
        parts, advantages = [], []
        for number, batch in enumerate(batches):
            rows = [row for row, (of_batch, _) in enumerate(members) if of_batch == number]
            parts.append(batch.select(np.array([members[row][1] for row in rows])))
            advantages.append(advantages_GN[rows])
        metrics = self.group_policy.update(RolloutBatch.concatenate(parts), np.concatenate(advantages).reshape(-1))
        self.version += 1
        return {
            **metrics,
            "staleness": float(self.version - 1 - np.concatenate([part.weight_versions for part in parts]).mean()),
        }

    def exported_weights(self) -> tuple[np.ndarray, int]:
        """Safetensors buffer (uint8) and its version."""
        return self.engine.exported_weights(), self.version

    def save(self, folder: str) -> str:
        """Write a checkpoint that transformers and vLLM load as it is."""
        self.engine.save(folder, self.tokenizer)
        return folder


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


LearnerActor: Any = ray.remote(LearnerRank)
