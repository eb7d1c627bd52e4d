"""The ranking actor: a checkpoint that ranks the catalogue by constrained beam search."""

from __future__ import annotations

import numpy as np
import ray
import torch
from transformers import AutoTokenizer

from evaluation.ranking import beam_search
from item_index.constraint import AnswerConstraint, Mode
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens
from item_index.trie import ItemTrie
from learner.policy import load_language_model


class RankingWorker:
    """Ranks items after prompts (direct) or after prompts with a chain and the opened answer (reasoning)."""

    def __init__(self, model_folder: str, index_folder: str, *, threads: int) -> None:
        torch.set_num_threads(threads)
        index = SemanticIdIndex.load(index_folder)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
        self.model = load_language_model(model_folder).eval()
        self.tokens = SemanticIdTokens.of(
            tokenizer, index, vocabulary_size=self.model.get_output_embeddings().weight.shape[0]
        )
        self.constraint = AnswerConstraint(ItemTrie.build(index.codes_IL, index.lengths_I), self.tokens)

    def rank(
        self, prompts: RaggedArray, excluded: RaggedArray, *, mode: Mode, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items int32 [U, width] and log-probabilities float32 [U, width]; see `beam_search`."""
        terminator = self.tokens.end_of_sequence if mode == "direct" else self.tokens.answer_close
        return beam_search(
            self.model, self.constraint, list(prompts), list(excluded), width=width, terminator=terminator
        )


RankingActor = ray.remote(RankingWorker)
