"""The corpus of a run as one folder: catalogue, sequences, reasoning examples, tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.reasoning import MetadataTeacher, quality_problem
from curriculum.rows import ReasoningExample, held_out_targets, places_in_sequence, train_positions
from curriculum.tokenizer import load_tokenizer, train_tokenizer
from item_index.catalogue import Catalogue
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens


@dataclass(frozen=True)
class Corpus:
    """What the later stages read."""

    index: SemanticIdIndex
    catalogue: Catalogue
    sequences: UserSequences
    held_out: np.ndarray
    reasoning: list[ReasoningExample]
    tokenizer: Any
    builder: PromptBuilder
    summary: dict[str, Any]


def write_reasoning_examples(
    catalogue: Catalogue,
    sequences: UserSequences,
    held_out: np.ndarray,
    index: SemanticIdIndex,
    *,
    history_items: int,
    minimum_history: int,
    rewritten_history_items: int,
    rows: int | None,
    seed: int,
) -> tuple[list[ReasoningExample], dict[str, Any]]:
    """Traces of the embedded teacher for train targets that are not held out, and what the quality gate said.

    At most `rows` targets, drawn by the seed; rejected traces are counted by reason, with the first of each reason.
    """
    teacher = MetadataTeacher(catalogue, rewritten_history_items=rewritten_history_items)
    places = places_in_sequence(sequences)
    eligible = np.nonzero(train_positions(sequences) & (places >= minimum_history) & ~held_out)[0]
    chosen = np.random.default_rng([seed, 2]).permutation(eligible)[:rows]
    examples: list[ReasoningExample] = []
    rejected, first_rejected = Counter[str](), dict[str, str]()
    removed, history_total = 0, 0
    for at in chosen:
        history = sequences.items[max(at - places[at], at - history_items) : at]
        target = int(sequences.items[at])
        trace = teacher.trace(history.tolist(), target)
        problem = quality_problem(trace, catalogue, target)
        if problem is not None:
            rejected[problem] += 1
            first_rejected.setdefault(problem, " ".join(trace.steps))
            continue
        think, rewriting = trace.render(index.text)
        examples.append(ReasoningExample(int(at), tuple(history.tolist()), target, think, rewriting))
        removed += trace.removed
        history_total += len(history)
    counts = {
        "reasoning_rows": len(examples),
        "rejected_traces": dict(rejected),
        "first_rejected": first_rejected,
        "removed_share": removed / max(history_total, 1),
    }
    return examples, counts


def build_corpus(
    folder: Path,
    *,
    catalogue: Catalogue,
    sequences: UserSequences,
    index: SemanticIdIndex,
    checkpoint: str | None,
    history_items: int,
    minimum_history: int,
    rewritten_history_items: int,
    reasoning_rows: int | None,
    rl_holdout: float,
    text_vocabulary: int,
    seed: int,
) -> dict[str, Any]:
    """Write the corpus folder; returns its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_targets(sequences, share=rl_holdout, minimum_history=minimum_history, seed=seed)
    examples, counts = write_reasoning_examples(
        catalogue, sequences, held_out, index, history_items=history_items, minimum_history=minimum_history,
        rewritten_history_items=rewritten_history_items, rows=reasoning_rows, seed=seed,
    )  # fmt: skip
    tokenizer = (
        load_tokenizer(checkpoint, index)
        if checkpoint
        else train_tokenizer(
            (f"{example.think} {example.rewriting.split('<|')[0]}" for example in examples),
            index,
            vocabulary_size=text_vocabulary,
        )
    )
    tokenizer.save_pretrained(folder / "tokenizer")
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
        folder / "sequences.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "position": [example.position for example in examples],
                "history": [list(example.history) for example in examples],
                "target": [example.target for example in examples],
                "think": [example.think for example in examples],
                "rewriting": [example.rewriting for example in examples],
            },
            schema=pa.schema(
                {
                    "position": pa.int64(),
                    "history": pa.list_(pa.int64()),
                    "target": pa.int64(),
                    "think": pa.string(),
                    "rewriting": pa.string(),
                }
            ),
        ),
        folder / "reasoning.parquet",
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


def load_corpus(folder: Path, index_folder: Path) -> Corpus:
    """Read a corpus folder and its index. Raises InputError when the tokenizer lacks the index's tokens."""
    index = SemanticIdIndex.load(index_folder)
    summary = json.loads((folder / "summary.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    tokens = SemanticIdTokens.of(tokenizer, index)
    table = pq.read_table(folder / "sequences.parquet")
    items = table["items"].combine_chunks()
    sequences = UserSequences(
        user_ids=tuple(table["user_id"].to_pylist()),
        offsets_U1=items.offsets.to_numpy().astype(np.int64),
        items=items.values.to_numpy(zero_copy_only=False).astype(np.int64),
        timestamps=table["timestamps"].combine_chunks().values.to_numpy(zero_copy_only=False).astype(np.int64),
    )
    return Corpus(
        index=index,
        catalogue=Catalogue.load(folder / "items.parquet"),
        sequences=sequences,
        held_out=table["held_out"].combine_chunks().values.to_numpy(zero_copy_only=False),
        reasoning=[
            ReasoningExample(row["position"], tuple(row["history"]), row["target"], row["think"], row["rewriting"])
            for row in pq.read_table(folder / "reasoning.parquet").to_pylist()
        ],
        tokenizer=tokenizer,
        builder=PromptBuilder(tokenizer, index, tokens, history_items=summary["history_items"]),
        summary=summary,
    )
