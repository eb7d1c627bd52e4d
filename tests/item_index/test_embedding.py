"""Encoders: what they compute, that a saved one is the very same, and how they refuse what they cannot use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from item_index.catalogue import Catalogue
from item_index.embedding import (
    BLOCK_ITEMS,
    Encoder,
    LanguageModelEncoder,
    SentenceTransformerEncoder,
    TfIdfEncoder,
    encoded_blocks,
    load_encoder,
)
from item_index.input_error import InputError

TEXTS = [f"{colour} {animal} number {number}" for colour in ("red", "blue") for animal in ("fox", "owl", "bee")
         for number in range(5)]  # fmt: skip


def items_of(titles: list[str], descriptions: list[str] | None = None) -> Catalogue:
    count = len(titles)
    return Catalogue(
        tuple(f"item-{row}" for row in range(count)), tuple(titles), tuple(descriptions or [""] * count),
        ((),) * count, ("",) * count,
    )  # fmt: skip


def tf_idf(texts: list[str], dimensions: int = 8, **more: Any) -> np.ndarray:
    items = items_of(texts)
    return TfIdfEncoder.fit(items, dimensions=dimensions, seed=0, **more).encode(items)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def expect_the_same_when_loaded(encoder: Encoder, items: Catalogue, folder: Path) -> None:
    encoder.save(folder)
    loaded = load_encoder(folder)
    assert type(loaded) is type(encoder)
    np.testing.assert_array_equal(loaded.encode(items), encoder.encode(items))


def test_shape_and_type() -> None:
    vectors = tf_idf(TEXTS)
    assert vectors.shape == (len(TEXTS), 8)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


def test_texts_that_share_words_are_closer() -> None:
    vectors = tf_idf(["red fox jumps", "red fox sleeps", "tax law handbook", "tax law survey"], 3)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.3
    assert cosine(vectors[2], vectors[3]) > cosine(vectors[1], vectors[3]) + 0.3


def test_with_all_dimensions_distances_are_those_of_tf_idf() -> None:
    """TF-IDF by hand: 1 + ln(count), times ln((1 + n) / (1 + documents)) + 1, each text of unit length."""
    texts = ["red fox", "red red owl", "owl"]
    terms = ["red", "fox", "owl", "red fox", "red red", "red owl"]
    counts = np.array([[1, 1, 0, 1, 0, 0], [2, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]])
    assert counts.shape == (3, len(terms))
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0.0) * (np.log(4 / (1 + (counts > 0).sum(0))) + 1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    vectors = tf_idf(texts, 3)
    np.testing.assert_allclose(vectors @ vectors.T, weights @ weights.T, atol=1e-5)


def test_same_seed_gives_the_same_vectors() -> None:
    np.testing.assert_array_equal(tf_idf(TEXTS, 6), tf_idf(TEXTS, 6))


@pytest.mark.parametrize("texts", [["M"], ["same", "same", "same"], ["alpha", "beta"]])
def test_tiny_catalogues_get_fewer_dimensions(texts: list[str]) -> None:
    vectors = tf_idf(texts, 64)
    assert len(vectors) == len(texts)
    assert 1 <= vectors.shape[1] <= len(texts)
    assert np.isfinite(vectors).all()


def test_titles_of_one_letter_have_vectors() -> None:
    assert (np.abs(tf_idf(["M", "Z", "M Z"], 2)).sum(axis=1) > 0).all()


@pytest.mark.parametrize("texts", [[], ["...", "!?"]])
def test_nothing_to_embed_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError):
        tf_idf(texts)


def test_dimensions_must_be_positive() -> None:
    with pytest.raises(InputError, match="dimensions"):
        tf_idf(TEXTS, 0)


def test_a_saved_tf_idf_encoder_is_the_same_for_old_and_new_items(tmp_path: Path) -> None:
    encoder = TfIdfEncoder.fit(items_of(TEXTS), dimensions=6, seed=0)
    newcomers = items_of(["green fox number 3", "épée", "red"], ["Ünïcode, and a red owl.", "", "<b>blue</b>"])
    for number, items in enumerate((items_of(TEXTS), newcomers)):
        expect_the_same_when_loaded(encoder, items, tmp_path / str(number))
    assert not encoder.encode(newcomers)[1].any(), "no known word"
    assert {file.suffix for file in (tmp_path / "0").iterdir()} == {".json", ".safetensors"}, "no pickle"


def test_a_large_catalogue_is_learnt_from_a_sample_and_encoded_whole() -> None:
    texts = [f"word{row} shared" for row in range(40)]
    encoder = TfIdfEncoder.fit(items_of(texts), dimensions=4, seed=0, fit_items=10)
    assert sum(term.startswith("word") and " " not in term for term in encoder.terms) == 10
    assert encoder.encode(items_of(texts)).shape == (40, 4)
    assert TfIdfEncoder.fit(items_of(texts), dimensions=4, seed=0, fit_items=10).terms == encoder.terms
    assert TfIdfEncoder.fit(items_of(texts), dimensions=4, seed=1, fit_items=10).terms != encoder.terms


def test_blocks_hold_all_items_in_order() -> None:
    items = items_of([f"tale {row % 7}" for row in range(2 * BLOCK_ITEMS + 5)])
    encoder = TfIdfEncoder.fit(items, dimensions=3, seed=0)
    blocks = list(encoded_blocks(encoder, items))
    assert [len(vectors) for _, vectors in blocks] == [BLOCK_ITEMS, BLOCK_ITEMS, 5]
    assert sum((ids for ids, _ in blocks), ()) == items.item_ids
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in blocks]), encoder.encode(items))


ITEMS = items_of(
    ["Evidence", "steady <b>drama</b> and more drama", "Preference: drama. Intent: drama.", "Z", "drama"],
    ["mostly drama", "", "steady", "a very long description of drama, and again of drama, and of drama", " <br> "],
)


def pooled_one_by_one(checkpoint: Path, items: Catalogue, maximum_tokens: int) -> np.ndarray:
    """The same by the plainest means: no batches, no padding, no cleaning beyond what ITEMS needs."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rows = []
    for title, description in zip(items.titles, items.descriptions, strict=True):
        parts = []
        for text in (title.replace("<b>", "").replace("</b>", ""), description.replace("<br>", "").strip()):
            if text:
                tokens = torch.tensor([tokenizer(text)["input_ids"][:maximum_tokens]])
                with torch.no_grad():
                    parts.append(model.model(tokens).last_hidden_state[0].mean(dim=0))
        rows.append(torch.stack(parts).mean(dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_a_language_model_pools_title_and_description_apart(tiny, batch_tokens: int) -> None:
    vectors = LanguageModelEncoder(tiny.checkpoint, maximum_tokens=12, batch_tokens=batch_tokens).encode(ITEMS)
    expected = pooled_one_by_one(tiny.checkpoint, ITEMS, 12)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    title = items_of(["drama"])
    np.testing.assert_allclose(
        vectors[4], LanguageModelEncoder(tiny.checkpoint).encode(title)[0], atol=2e-6, err_msg="title alone"
    )


def test_over_long_text_is_cut_at_the_token_limit(tiny) -> None:
    long, cut = (LanguageModelEncoder(tiny.checkpoint, maximum_tokens=limit).encode(ITEMS)[3] for limit in (512, 5))
    assert np.abs(long - cut).max() > 1e-3
    assert np.abs(cut).max() > 0


def test_a_saved_language_model_encoder_is_the_same(tiny, tmp_path: Path) -> None:
    encoder = LanguageModelEncoder(tiny.checkpoint, maximum_tokens=7, batch_tokens=40)
    expect_the_same_when_loaded(encoder, ITEMS, tmp_path / "encoder")
    assert sum(file.stat().st_size for file in (tmp_path / "encoder").iterdir()) < 1000, "no copy of the weights"


def test_an_item_without_a_token_is_named(tiny) -> None:
    items = replace(items_of(["drama", "<br>"]), item_ids=("a", "b"))
    with pytest.raises(InputError, match="item 'b' holds no token"):
        LanguageModelEncoder(tiny.checkpoint).encode(items)


def test_a_model_that_changed_or_went_after_saving_is_refused(tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.checkpoint, model)
    LanguageModelEncoder(model).save(tmp_path / "encoder")
    load_encoder(tmp_path / "encoder")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match="has changed since the encoder was saved"):
        load_encoder(tmp_path / "encoder")
    shutil.rmtree(model)
    with pytest.raises(InputError, match="no such model folder"):
        load_encoder(tmp_path / "encoder")


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    for encoder in (LanguageModelEncoder(tmp_path), SentenceTransformerEncoder(tmp_path)):
        with pytest.raises(InputError, match="does not load as a") as caught:
            encoder.encode(ITEMS)
        assert (caught.value.file, caught.value.field) == (str(tmp_path), "index.encoder_path")


@pytest.mark.parametrize("kind", [LanguageModelEncoder, SentenceTransformerEncoder])
def test_a_missing_model_folder_is_named(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(InputError, match="nowhere"):
        kind(tmp_path / "nowhere")


def test_an_encoder_folder_that_is_missing_or_of_another_release(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no encoder"):
        load_encoder(tmp_path)
    (tmp_path / "encoder.json").write_text('{"format_version": 1, "kind": "crystal ball"}')
    with pytest.raises(InputError, match="'crystal ball' is not known"):
        load_encoder(tmp_path)


def test_a_sentence_transformers_model_reads_the_whole_passage(tiny, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    reader = Transformer(str(tiny.checkpoint))
    model = SentenceTransformer(modules=[reader, Pooling(reader.get_embedding_dimension())], device="cpu")
    model.save(str(tmp_path / "model"))
    encoder = SentenceTransformerEncoder(tmp_path / "model")
    vectors = encoder.encode(items_of(["drama", "more"], ["Steady drama.", ""]))
    np.testing.assert_allclose(vectors, model.encode(["drama. Steady drama.", "more."]), atol=1e-6)
    expect_the_same_when_loaded(encoder, ITEMS, tmp_path / "encoder")


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="Install"):
        SentenceTransformerEncoder(tmp_path).encode(ITEMS)


def test_torch_is_imported_only_by_the_encoders_that_need_it() -> None:
    code = "import sys, item_index.embedding; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
