"""Reasoning examples of a corpus: a teacher's steps, the denoised history, the gate, and what came of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from curriculum.denoising import Denoiser
from curriculum.interactions import UserSequences
from curriculum.prompts import PromptBuilder
from curriculum.reasoning import MetadataTeacher, ReasoningTrace, quality_problem, user_text_problem
from curriculum.rows import ReasoningExample, UserText, places_in_sequence, train_positions
from curriculum.teachers import METADATA, LanguageModelTeacher, Lesson, metadata_lesson, read_lessons
from item_index.catalogue import Catalogue
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from rewards.chains import CHAIN, chain_figures

REJECTED_EXAMPLES = 3  # of each reason that are written down


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
    teacher: LanguageModelTeacher | None = None,
) -> tuple[list[ReasoningExample], list[UserText], list[RejectedTrace], dict[str, Any]]:
    """Traces and user texts for train targets that are not held out, and what the quality gate said.

    At most `rows` targets, drawn by the seed. A target without an accepted trace has neither example nor text, so both
    lists are of the same targets. Rejected traces are counted by reason, and the first three of each reason come back
    with the target's title.

    The embedded teacher writes, or the language model that `teacher` names. Where that has no lesson that passes the
    gate, the embedded teacher's is taken if `teacher.fallback`, and the target is left out if not; both are counted.
    The rewriting is the denoiser's, whoever writes.
    """
    metadata_teacher = MetadataTeacher(catalogue)
    places = places_in_sequence(sequences)
    eligible = np.nonzero(train_positions(sequences) & (places >= minimum_history) & ~held_out)[0]
    chosen = np.random.default_rng([seed, 2]).permutation(eligible)[:rows]
    histories = [sequences.items[max(at - places[at], at - history_items) : at] for at in chosen]
    users = np.searchsorted(sequences.offsets_U1, chosen, side="right") - 1
    rewritings = denoiser.keep_many(RaggedArray.of(histories, np.int64), sequences.items[chosen], users)
    lessons: list[Lesson | None] = []
    teacher_counts: dict[str, Any] = {}
    if teacher is not None:
        asked = [(items.tolist(), int(sequences.items[at])) for items, at in zip(histories, chosen, strict=True)]
        lessons, teacher_counts = read_lessons(teacher, catalogue, asked)
    writers = [] if teacher is None else [teacher.source]
    if teacher is None or teacher.fallback:
        writers.append(METADATA)
    examples: list[ReasoningExample] = []
    user_texts: list[UserText] = []
    rejected: list[RejectedTrace] = []
    reasons, accepted_from, rejected_from = Counter[str](), Counter[str](), Counter[str]()
    lengths: list[int] = []
    removed = 0
    for number, (at, items, rewritten) in enumerate(zip(chosen, histories, rewritings, strict=True)):
        history, target = tuple(items.tolist()), int(sequences.items[at])
        for source in writers:
            lesson = metadata_lesson(metadata_teacher, history, target) if source == METADATA else lessons[number]
            if lesson is None:
                continue
            trace = ReasoningTrace(lesson.steps, tuple(rewritten.tolist()), removed=len(history) - len(rewritten))
            texts = f"{lesson.preference}\n{lesson.query}"
            problem = quality_problem(
                trace, catalogue, target, history=history, target_text=index.text(target),
                maximum_characters=maximum_think_characters,
            ) or user_text_problem(texts, catalogue, target)  # fmt: skip
            think, rewriting = trace.render(index.text)
            if problem is not None:
                rejected_from[source] += 1
                reasons[problem] += 1
                if reasons[problem] <= REJECTED_EXAMPLES:
                    written = f"{think}\n{rewriting}\n{texts}"
                    rejected.append(RejectedTrace(problem, int(at), catalogue.titles[target], written))
                continue
            examples.append(ReasoningExample(int(at), history, target, think, rewriting, source))
            user_texts.append(UserText(int(at), lesson.preference, lesson.query))
            accepted_from[source] += 1
            lengths.append(len(history))
            removed += trace.removed
            break
    if teacher is not None:
        teacher_counts |= {
            "rejected": rejected_from[teacher.source],
            "fell_back": accepted_from[METADATA],
            "left_out": len(chosen) - len(examples),
        }
    _, by_bound_E = denoiser.removals(np.array(lengths, dtype=np.int64))
    counts = {
        "reasoning_rows": len(examples),
        "rows_by_source": dict(accepted_from),
        "teacher": teacher_counts,
        "rejected_traces": dict(reasons),
        "removed_items": removed,
        "removed_share": removed / max(sum(lengths), 1),
        "removed_by_bound": int(by_bound_E.sum()),
    }
    return examples, user_texts, rejected, counts


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
