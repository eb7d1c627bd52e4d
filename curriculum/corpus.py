"""The corpus of a run as one folder: catalogue, sequences, reasoning examples, user texts, tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.reasoning import MetadataTeacher
from curriculum.rows import ReasoningExample, UserText, held_out_targets, places_in_sequence, train_positions
from curriculum.teachers import METADATA, LanguageModelTeacher, Lesson, lesson_problem, metadata_lesson, read_lessons
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
    user_texts: list[UserText]
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
    teacher: LanguageModelTeacher | None = None,
) -> tuple[list[ReasoningExample], list[UserText], dict[str, Any]]:
    """Traces and user texts for train targets that are not held out, and what the quality gate said.

    At most `rows` targets, drawn by the seed; rejected traces are counted by reason, with the first of each reason. A
    target without an accepted trace has neither example nor text, so both lists are of the same targets.

    The embedded teacher writes, or the language model that `teacher` names. Where that has no lesson that passes the
    gate, the embedded teacher's is taken if `teacher.fallback`, and the target is left out if not; both are counted.
    """
    metadata_teacher = MetadataTeacher(catalogue, rewritten_history_items=rewritten_history_items)
    places = places_in_sequence(sequences)
    eligible = np.nonzero(train_positions(sequences) & (places >= minimum_history) & ~held_out)[0]
    chosen = np.random.default_rng([seed, 2]).permutation(eligible)[:rows]
    histories = [sequences.items[max(at - places[at], at - history_items) : at].tolist() for at in chosen]
    targets = sequences.items[chosen].tolist()
    lessons: list[Lesson | None] = []
    teacher_counts: dict[str, Any] = {}
    if teacher is not None:
        lessons, teacher_counts = read_lessons(teacher, catalogue, list(zip(histories, targets, strict=True)))
    writers = [] if teacher is None else [teacher.source]
    if teacher is None or teacher.fallback:
        writers.append(METADATA)
    examples: list[ReasoningExample] = []
    user_texts: list[UserText] = []
    accepted_from, rejected_from = Counter[str](), Counter[str]()
    rejected, first_rejected = Counter[str](), dict[str, str]()
    removed, history_total = 0, 0
    for number, (at, history, target) in enumerate(zip(chosen, histories, targets, strict=True)):
        for source in writers:
            lesson = metadata_lesson(metadata_teacher, history, target) if source == METADATA else lessons[number]
            if lesson is None:
                continue
            trace = replace(metadata_teacher.trace(history, target), steps=lesson.steps)
            problem = lesson_problem(lesson, trace, catalogue, target)
            if problem is not None:
                rejected_from[source] += 1
                rejected[problem] += 1
                first_rejected.setdefault(problem, " ".join(trace.steps))
                continue
            think, rewriting = trace.render(index.text)
            examples.append(ReasoningExample(int(at), tuple(history), target, think, rewriting, source))
            user_texts.append(UserText(int(at), lesson.preference, lesson.query))
            accepted_from[source] += 1
            removed += trace.removed
            history_total += len(history)
            break
    if teacher is not None:
        teacher_counts |= {
            "rejected": rejected_from[teacher.source],
            "fell_back": accepted_from[METADATA],
            "left_out": len(chosen) - len(examples),
        }
    counts = {
        "reasoning_rows": len(examples),
        "rows_by_source": dict(accepted_from),
        "teacher": teacher_counts,
        "rejected_traces": dict(rejected),
        "first_rejected": first_rejected,
        "removed_share": removed / max(history_total, 1),
    }
    return examples, user_texts, counts


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
    teacher: LanguageModelTeacher | None = None,
) -> dict[str, Any]:
    """Write the corpus folder; returns its summary. For `teacher` see `write_reasoning_examples`."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_targets(sequences, share=rl_holdout, minimum_history=minimum_history, seed=seed)
    examples, user_texts, counts = write_reasoning_examples(
        catalogue, sequences, held_out, index, history_items=history_items, minimum_history=minimum_history,
        rewritten_history_items=rewritten_history_items, rows=reasoning_rows, seed=seed, teacher=teacher,
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
