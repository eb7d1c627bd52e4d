from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from item_index.embedding import embed_texts
from item_index.input_error import InputError

TEXTS = [f"{colour} {animal} number {number}" for colour in ("red", "blue") for animal in ("fox", "owl", "bee")
         for number in range(5)]  # fmt: skip


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def test_shape_and_type() -> None:
    vectors = embed_texts(TEXTS, dimensions=8)
    assert vectors.shape == (len(TEXTS), 8)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


def test_texts_that_share_words_are_closer() -> None:
    vectors = embed_texts(["red fox jumps", "red fox sleeps", "tax law handbook", "tax law survey"], dimensions=3)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.3
    assert cosine(vectors[2], vectors[3]) > cosine(vectors[1], vectors[3]) + 0.3


def test_same_seed_gives_the_same_vectors() -> None:
    np.testing.assert_array_equal(embed_texts(TEXTS, dimensions=6, seed=3), embed_texts(TEXTS, dimensions=6, seed=3))


@pytest.mark.parametrize("texts", [["M"], ["same", "same", "same"], ["alpha", "beta"]])
def test_tiny_catalogues_get_fewer_dimensions(texts: list[str]) -> None:
    vectors = embed_texts(texts, dimensions=64)
    assert len(vectors) == len(texts)
    assert 1 <= vectors.shape[1] <= len(texts)
    assert np.isfinite(vectors).all()


def test_titles_of_one_letter_have_vectors() -> None:
    vectors = embed_texts(["M", "Z", "M Z"], dimensions=2)
    assert (np.abs(vectors).sum(axis=1) > 0).all()


@pytest.mark.parametrize("texts", [[], ["...", "!?"]])
def test_nothing_to_embed_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError):
        embed_texts(texts)


def test_dimensions_must_be_positive() -> None:
    with pytest.raises(InputError, match="dimensions"):
        embed_texts(TEXTS, dimensions=0)


def test_missing_encoder_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        embed_texts(TEXTS, sentence_transformer=str(tmp_path / "nowhere"))


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="Install"):
        embed_texts(TEXTS, sentence_transformer=str(tmp_path))


def test_named_encoder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        def __init__(self, path: str, *, local_files_only: bool) -> None:
            assert path == str(tmp_path)
            assert local_files_only

        def encode(self, texts: list[str], **_: bool) -> np.ndarray:
            return np.array([[len(text), 1.0] for text in texts])

    class Library:
        SentenceTransformer = Encoder

    monkeypatch.setitem(sys.modules, "sentence_transformers", Library)
    vectors = embed_texts(["ab", "abcd"], sentence_transformer=str(tmp_path))
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[2, 1], [4, 1]])
