"""The ranking actor: a checkpoint that ranks the catalogue by constrained beam search."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoTokenizer

from evaluation.ranking import beam_search
from item_index.constraint import AnswerConstraint, Mode
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from learner.policy import load_language_model


def ranking_device() -> torch.device:
    """The GPU that torch finds, or else the CPU; Ray shows an actor only the GPUs that it reserves for it.

    Raises InputError where Ray has reserved a GPU and torch cannot use it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    reserved = ray.get_runtime_context().get_accelerator_ids().get("GPU", []) if ray.is_initialized() else []
    if reserved:
        raise InputError(
            f"GPU {', '.join(reserved)} is reserved for the beam search, and torch {torch.__version__} finds none",
            field="cluster.ranking_gpus, serving.direct.gpus or serving.reasoning.gpus",
            remedy="Install the extra `gpu` on that node, or reserve none.",
        )
    return torch.device("cpu")


class RankingWorker:
    """Ranks items after prompts (direct) or after prompts with a chain and the opened answer (reasoning), on the GPU
    where one is reserved."""

    def __init__(self, model_folder: str, index_folder: str, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        self.model = load_language_model(model_folder).eval().to(ranking_device())
        rows = self.model.get_output_embeddings().weight.shape[0]
        self.constraint = AnswerConstraint.of(SemanticIdIndex.load(index_folder), self.tokenizer, vocabulary_size=rows)

    def rank(
        self, prompts: RaggedArray, excluded: RaggedArray, *, mode: Mode, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items int32 [U, width] and log-probabilities float32 [U, width]; see `beam_search`."""
        tokens = self.constraint.tokens
        terminator = tokens.end_of_sequence if mode == "direct" else tokens.answer_close
        return beam_search(
            self.model, self.constraint, list(prompts), list(excluded), width=width, terminator=terminator
        )


RankingActor: Any = ray.remote(RankingWorker)
