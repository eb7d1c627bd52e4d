"""The corpus of a run as one folder: catalogue, sequences, reasoning examples, user texts, tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curriculum.alignment import alignment_texts
from curriculum.denoising import Denoiser
from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.reasoning_examples import corpus_chains, write_reasoning_examples
from curriculum.rows import ReasoningExample, UserText, held_out_targets
from curriculum.teachers import LanguageModelTeacher
from curriculum.tokenizer import load_tokenizer, saved_tokenizer, train_tokenizer
from item_index.catalogue import Catalogue
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens
from rewards.chains import chain_metrics

SEQUENCES_FILE = "sequences.parquet"


@dataclass(frozen=True)
class Corpus:
    """What the later stages read."""

    index: SemanticIdIndex
    catalogue: Catalogue
    sequences: UserSequences
    held_out: np.ndarray
    reasoning: list[ReasoningExample]
    user_texts: list[UserText]
    tokenizer: Any
    builder: PromptBuilder
    summary: dict[str, Any]

    def with_titles(self, text: str) -> str:
        """A text in which semantic IDs, longest first, are replaced by their items' titles in brackets."""
        for row in np.argsort(-self.index.lengths_I, kind="stable").tolist():
            text = text.replace(self.index.text(row), f" [{self.catalogue.titles[row]}]")
        return text


def build_corpus(
    folder: Path,
    *,
    catalogue: Catalogue,
    sequences: UserSequences,
    index: SemanticIdIndex,
    item_vectors_ID: np.ndarray,
    checkpoint: str | None,
    history_items: int,
    minimum_history: int,
    removed_share: float,
    rewritten_history_items: int | None,
    maximum_think_characters: int,
    minimum_think_tokens: int,
    reasoning_rows: int | None,
    rl_holdout: float,
    text_vocabulary: int,
    seed: int,
    teacher: LanguageModelTeacher | None = None,
) -> dict[str, Any]:
    """Write the corpus folder; returns its summary.

    `item_vectors_ID` are the vectors of the catalogue's items; for `teacher` see `write_reasoning_examples`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_targets(sequences, share=rl_holdout, minimum_history=minimum_history, seed=seed)
    denoiser = Denoiser(
        item_vectors_ID, sequences.train_matrix(len(catalogue)), removed_share=removed_share,
        maximum_items=rewritten_history_items,
    )  # fmt: skip
    examples, user_texts, rejected, counts = write_reasoning_examples(
        catalogue, sequences, held_out, index, denoiser, history_items=history_items, minimum_history=minimum_history,
        maximum_think_characters=maximum_think_characters, rows=reasoning_rows, seed=seed, teacher=teacher,
    )  # fmt: skip
    tokenizer = (
        load_tokenizer(checkpoint, index)
        if checkpoint
        else train_tokenizer(
            chain(
                alignment_texts(catalogue, user_texts),
                (f"{example.think} {example.rewriting.split('<|')[0]}" for example in examples),
            ),
            index,
            vocabulary_size=text_vocabulary,
        )
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    builder = PromptBuilder(tokenizer, index, SemanticIdTokens.of(tokenizer, index), history_items=history_items)
    counts["chains"] = chain_metrics(corpus_chains(examples, builder), minimum_think_tokens=minimum_think_tokens)
    pq.write_table(
        pa.table(
            {
                "item_id": list(catalogue.item_ids),
                "title": list(catalogue.titles),
                "description": list(catalogue.descriptions),
                "categories": [list(categories) for categories in catalogue.categories],
                "brand": list(catalogue.brands),
            }
        ),
        folder / "items.parquet",
    )
    lengths = np.diff(sequences.offsets_U1)
    pq.write_table(
        pa.table(
            {
                "user_id": list(sequences.user_ids),
                "items": pa.ListArray.from_arrays(sequences.offsets_U1.astype(np.int32), sequences.items),
                "timestamps": pa.ListArray.from_arrays(sequences.offsets_U1.astype(np.int32), sequences.timestamps),
                "held_out": pa.ListArray.from_arrays(sequences.offsets_U1.astype(np.int32), held_out),
            }
        ),
        folder / SEQUENCES_FILE,
    )
    pq.write_table(
        pa.table(
            {
                "position": [example.position for example in examples],
                "history": [list(example.history) for example in examples],
                "target": [example.target for example in examples],
                "think": [example.think for example in examples],
                "rewriting": [example.rewriting for example in examples],
                "source": [example.source for example in examples],
            },
            schema=pa.schema(
                {
                    "position": pa.int64(),
                    "history": pa.list_(pa.int64()),
                    "target": pa.int64(),
                    "think": pa.string(),
                    "rewriting": pa.string(),
                    "source": pa.string(),
                }
            ),
        ),
        folder / "reasoning.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "reason": [example.reason for example in rejected],
                "position": [example.position for example in rejected],
                "title": [example.title for example in rejected],
                "trace": [example.trace for example in rejected],
            },
            schema=pa.schema(
                {"reason": pa.string(), "position": pa.int64(), "title": pa.string(), "trace": pa.string()}
            ),
        ),
        folder / "rejected.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "position": pa.array([text.position for text in user_texts], pa.int64()),
                "preference": pa.array([text.preference for text in user_texts], pa.string()),
                "query": pa.array([text.query for text in user_texts], pa.string()),
                "source": pa.array([example.source for example in examples], pa.string()),
            }
        ),
        folder / "user_texts.parquet",
    )
    summary = {
        "index_version": index.version,
        "split_fingerprint": sequences.fingerprint(),
        "users": len(sequences),
        "items": len(catalogue),
        "interactions": len(sequences.items),
        "mean_sequence": float(lengths.mean()),
        "held_out_targets": int(held_out.sum()),
        "history_items": history_items,
        "tokens_in_vocabulary": len(tokenizer),
        **counts,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def load_sequences(folder: Path) -> UserSequences:
    """The users' items of a corpus folder."""
    table = pq.read_table(folder / SEQUENCES_FILE, columns=["user_id", "items", "timestamps"])
    items = table["items"].combine_chunks()
    return UserSequences(
        user_ids=tuple(table["user_id"].to_pylist()),
        offsets_U1=items.offsets.to_numpy().astype(np.int64),
        items=items.values.to_numpy(zero_copy_only=False).astype(np.int64),
        timestamps=table["timestamps"].combine_chunks().values.to_numpy(zero_copy_only=False).astype(np.int64),
    )


def load_corpus(folder: Path, index_folder: Path) -> Corpus:
    """Read a corpus folder and its index. Raises InputError when the tokenizer lacks the index's tokens."""
    index = SemanticIdIndex.load(index_folder)
    summary = json.loads((folder / "summary.json").read_text())
    tokenizer = saved_tokenizer(folder / "tokenizer")
    tokens = SemanticIdTokens.of(tokenizer, index)
    return Corpus(
        index=index,
        catalogue=Catalogue.load(folder / "items.parquet"),
        sequences=load_sequences(folder),
        held_out=pq.read_table(folder / SEQUENCES_FILE, columns=["held_out"])["held_out"]
        .combine_chunks()
        .values.to_numpy(zero_copy_only=False),
        reasoning=[
            ReasoningExample(**row | {"history": tuple(row["history"])})
            for row in pq.read_table(folder / "reasoning.parquet").to_pylist()
        ],
        user_texts=[
            UserText(**row)
            for row in pq.read_table(
                folder / "user_texts.parquet", columns=["position", "preference", "query"]
            ).to_pylist()
        ],
        tokenizer=tokenizer,
        builder=PromptBuilder(tokenizer, index, tokens, history_items=summary["history_items"]),
        summary=summary,
    )
