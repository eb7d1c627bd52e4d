"""The corpus of a run as one folder: catalogue, sequences, reasoning examples, tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from curriculum.alignment import alignment_texts
from curriculum.denoising import Denoiser
from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.reasoning import MetadataTeacher, ReasoningTrace, quality_problem
from curriculum.rows import ReasoningExample, held_out_targets, places_in_sequence, train_positions
from curriculum.tokenizer import load_tokenizer, train_tokenizer
from item_index.catalogue import Catalogue
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens
from rewards.chains import CHAIN, chain_figures, chain_metrics

REJECTED_EXAMPLES = 3  # of each reason that are written down


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


@dataclass(frozen=True)
class RejectedTrace:
    """An example of what the quality gate turned away; `position` is the target's place in the flat items."""

    reason: str
    position: int
    title: str
    trace: str


def write_reasoning_examples(
    catalogue: Catalogue,
    sequences: UserSequences,
    held_out: np.ndarray,
    index: SemanticIdIndex,
    denoiser: Denoiser,
    *,
    history_items: int,
    minimum_history: int,
    maximum_think_characters: int,
    rows: int | None,
    seed: int,
) -> tuple[list[ReasoningExample], list[RejectedTrace], dict[str, Any]]:
    """Traces of the embedded teacher for train targets that are not held out, and what the quality gate said.

    At most `rows` targets, drawn by the seed. Rejected traces are counted by reason, and the first three of each reason
    come back with the target's title.
    """
    teacher = MetadataTeacher(catalogue)
    places = places_in_sequence(sequences)
    eligible = np.nonzero(train_positions(sequences) & (places >= minimum_history) & ~held_out)[0]
    chosen = np.random.default_rng([seed, 2]).permutation(eligible)[:rows]
    histories = [sequences.items[max(at - places[at], at - history_items) : at] for at in chosen]
    users = np.searchsorted(sequences.offsets_U1, chosen, side="right") - 1
    rewritings = denoiser.keep_many(RaggedArray.of(histories, np.int64), sequences.items[chosen], users)
    examples: list[ReasoningExample] = []
    rejected: list[RejectedTrace] = []
    reasons = Counter[str]()
    lengths: list[int] = []
    removed = 0
    for at, items, rewritten in zip(chosen, histories, rewritings, strict=True):
        history, target = tuple(items.tolist()), int(sequences.items[at])
        trace = ReasoningTrace(
            teacher.steps(history, target), tuple(rewritten.tolist()), removed=len(history) - len(rewritten)
        )
        problem = quality_problem(
            trace, catalogue, target, history=history, target_text=index.text(target),
            maximum_characters=maximum_think_characters,
        )  # fmt: skip
        think, rewriting = trace.render(index.text)
        if problem is not None:
            reasons[problem] += 1
            if reasons[problem] <= REJECTED_EXAMPLES:
                rejected.append(RejectedTrace(problem, int(at), catalogue.titles[target], f"{think}\n{rewriting}"))
            continue
        examples.append(ReasoningExample(int(at), history, target, think, rewriting))
        lengths.append(len(history))
        removed += trace.removed
    _, by_bound_E = denoiser.removals(np.array(lengths, dtype=np.int64))
    counts = {
        "reasoning_rows": len(examples),
        "rejected_traces": dict(reasons),
        "removed_items": removed,
        "removed_share": removed / max(sum(lengths), 1),
        "removed_by_bound": int(by_bound_E.sum()),
    }
    return examples, rejected, counts


def corpus_chains(examples: list[ReasoningExample], builder: PromptBuilder) -> np.ndarray:
    """Figures of the examples' own chains, dtype `rewards.chains.CHAIN` [examples], to hold a policy against."""
    index = builder.index
    codes = [tuple(row[:length]) for row, length in zip(index.codes_IL.tolist(), index.lengths_I, strict=True)]
    chains = np.zeros(len(examples), CHAIN)
    for number, example in enumerate(examples):
        chains[number] = chain_figures(
            builder.reasoning_response(example.think, example.rewriting, example.target),
            history={codes[item] for item in example.history}, special=builder.tokens,
            decode=builder.tokenizer.decode,
        )  # fmt: skip
    return chains


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
) -> dict[str, Any]:
    """Write the corpus folder; returns its summary. `item_vectors_ID` are the vectors of the catalogue's items."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_targets(sequences, share=rl_holdout, minimum_history=minimum_history, seed=seed)
    denoiser = Denoiser(
        item_vectors_ID, sequences.train_matrix(len(catalogue)), removed_share=removed_share,
        maximum_items=rewritten_history_items,
    )  # fmt: skip
    examples, rejected, counts = write_reasoning_examples(
        catalogue, sequences, held_out, index, denoiser, history_items=history_items, minimum_history=minimum_history,
        maximum_think_characters=maximum_think_characters, rows=reasoning_rows, seed=seed,
    )  # fmt: skip
    tokenizer = (
        load_tokenizer(checkpoint, index)
        if checkpoint
        else train_tokenizer(
            chain(
                alignment_texts(catalogue, ()),
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
