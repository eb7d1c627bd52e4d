"""The corpus folder: rewritten histories, what the gate turned away, and the figures of the corpus's own chains."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import make_index

from curriculum.corpus import build_corpus, load_corpus
from curriculum.denoising import Denoiser
from curriculum.interactions import UserSequences
from item_index.catalogue import Catalogue
from rewards.answer import REWRITE_MARKER, parse_answer
from rewards.chains import semantic_ids_in

ITEMS, USERS, HISTORY = 30, 20, 6
KINDS = ["Drama", "Comedy", "Horror", "Western", "Sci-Fi"]


@pytest.fixture(scope="module")
def parts():
    """Index, catalogue, sequences and vectors; no user has an item twice."""
    index = make_index(ITEMS)
    generator = np.random.default_rng(1)
    catalogue = Catalogue(
        item_ids=index.item_ids,
        titles=tuple(f"Tale number {row}" for row in range(ITEMS)),
        descriptions=("",) * ITEMS,
        categories=tuple((KINDS[row % 5], KINDS[row // 2 % 5]) for row in range(ITEMS)),
        brands=("",) * ITEMS,
    )
    lengths = generator.integers(5, 14, USERS)
    sequences = UserSequences(
        user_ids=tuple(range(USERS)),
        offsets_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate([generator.permutation(ITEMS)[:length] for length in lengths]).astype(np.int64),
        timestamps=np.arange(lengths.sum(), dtype=np.int64),
    )
    return index, catalogue, sequences, generator.normal(size=(ITEMS, 4)).astype(np.float32)


def build(
    folder, parts, *, catalogue=None, removed_share=0.3, rewritten_history_items=None, characters=4000, rows=None
):
    index, known, sequences, vectors = parts
    return build_corpus(
        folder, catalogue=catalogue or known, sequences=sequences, index=index, item_vectors_ID=vectors,
        checkpoint=None, history_items=HISTORY, minimum_history=2, removed_share=removed_share,
        rewritten_history_items=rewritten_history_items, maximum_think_characters=characters, minimum_think_tokens=8,
        reasoning_rows=rows, rl_holdout=0.2, text_vocabulary=300, seed=0,
    )  # fmt: skip


def codes_of(index, items):
    return [tuple(index.codes_IL[item, : index.lengths_I[item]].tolist()) for item in items]


@pytest.mark.parametrize(("removed_share", "most"), [(0.3, None), (0.0, None), (0.5, 2)])
def test_rewritten_histories_are_the_denoisers_for_the_rows_own_user(tmp_path, parts, removed_share, most):
    index, _, sequences, vectors = parts
    summary = build(tmp_path / "corpus", parts, removed_share=removed_share, rewritten_history_items=most)
    index.save(tmp_path / "index")
    corpus = load_corpus(tmp_path / "corpus", tmp_path / "index")
    assert len(corpus.reasoning) == summary["reasoning_rows"] > 20
    denoiser = Denoiser(vectors, sequences.train_matrix(ITEMS), removed_share=removed_share, maximum_items=most)
    removed = bounded = 0
    for example in corpus.reasoning:
        user = next(u for u in range(USERS) if example.position < sequences.offsets_U1[u + 1])
        kept = denoiser.keep(example.history, example.target, user=user)
        assert example.rewriting == f"{REWRITE_MARKER} {''.join(index.text(item) for item in kept)}"
        removed += len(example.history) - len(kept)
        by_share = min(int(removed_share * len(example.history) + 0.5), len(example.history) - 1)
        bounded += len(example.history) - len(kept) - by_share
    assert (summary["removed_items"], summary["removed_by_bound"]) == (removed, bounded)
    assert summary["removed_share"] == removed / sum(len(example.history) for example in corpus.reasoning)
    assert (removed > 0) == (removed_share > 0)
    assert (bounded > 0) == (most is not None)


def test_the_corpus_tells_the_figures_of_its_own_chains(tmp_path, parts):
    index = parts[0]
    summary = build(tmp_path / "corpus", parts)
    index.save(tmp_path / "index")
    corpus = load_corpus(tmp_path / "corpus", tmp_path / "index")
    special, lengths, rewritten = corpus.builder.tokens, [], []
    for example in corpus.reasoning:
        response = corpus.builder.reasoning_response(example.think, example.rewriting, example.target)
        assert parse_answer(response, mode="reasoning", special=special, decode=corpus.tokenizer.decode).well_formed
        lengths.append(response.index(special.think_close))
        ids = semantic_ids_in(response, special)
        assert ids[-1:] == codes_of(index, [example.target])
        assert set(ids[:-1]) <= set(codes_of(index, example.history))
        rewritten.append(len(ids) - 1)
    chains = json.loads((tmp_path / "corpus" / "summary.json").read_text())["chains"]
    assert chains == summary["chains"]
    assert chains["think_tokens"] == pytest.approx(np.mean(lengths))
    assert chains["think_tokens_10"] == pytest.approx(np.quantile(lengths, 0.1))
    assert chains["rewritten_items"] == pytest.approx(np.mean(rewritten))
    assert chains["complete_share"] == chains["markers_share"] == 1.0
    assert chains["foreign_share"] == 0.0


def test_rejected_traces_are_counted_and_three_of_each_reason_are_shown(tmp_path, parts):
    _, catalogue, sequences, _ = parts
    # Titles that the teacher's sentences hold, and that are no single word of them: every one of these is rejected.
    named = Catalogue(
        item_ids=catalogue.item_ids,
        titles=tuple("the next item" if row % 3 else title for row, title in enumerate(catalogue.titles)),
        descriptions=catalogue.descriptions, categories=catalogue.categories, brands=catalogue.brands,
    )  # fmt: skip
    summary = build(tmp_path, parts, catalogue=named)
    (reason, count), *others = summary["rejected_traces"].items()
    assert reason == "the target's title is named"
    assert others == []
    whole = build(tmp_path / "whole", parts)
    assert whole["rejected_traces"] == {}
    assert count == whole["reasoning_rows"] - summary["reasoning_rows"] > 3
    shown = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert len(shown) == 3
    for row in shown:
        target = int(sequences.items[row["position"]])
        assert target % 3
        assert (row["reason"], row["title"]) == (reason, "the next item")
        assert "the next item is likely" in row["trace"]
        assert REWRITE_MARKER in row["trace"]
    assert pq.read_table(tmp_path / "whole" / "rejected.parquet").num_rows == 0
    assert not set(pq.read_table(tmp_path / "reasoning.parquet")["position"].to_pylist()) & {
        row["position"] for row in shown
    }


def test_a_corpus_without_reasoning_rows(tmp_path, parts):
    for settings in ({"rows": 0}, {"characters": 10}):
        summary = build(tmp_path, parts, **settings)
        assert summary["reasoning_rows"] == summary["removed_items"] == summary["removed_share"] == 0
        assert summary["chains"] == {}
    assert set(summary["rejected_traces"]) == {"the steps are over the character limit"}
