"""Item text to vectors: TF-IDF with truncated SVD, or a sentence encoder from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from item_index.input_error import InputError


def embed_texts(
    texts: Sequence[str], *, dimensions: int = 64, sentence_transformer: str | None = None, seed: int = 0
) -> np.ndarray:
    """Vectors of item texts, float32 [items, D].

    Args:
        texts: one passage per item.
        dimensions: D of the TF-IDF vectors; fewer where the catalogue has fewer items or words. A sentence encoder
            keeps the width it was trained with.
        sentence_transformer: local folder of a sentence-transformers model; None for TF-IDF. Nothing is downloaded.
        seed: of the randomised SVD.

    Raises InputError for no texts, texts without a single word, or an encoder that is not there.
    """
    if not texts:
        raise InputError("there are no item texts to embed", remedy="Give a catalogue with at least one item.")
    if sentence_transformer is not None:
        return _embed_by_sentence_encoder(texts, sentence_transformer)
    return _embed_by_words(texts, dimensions, seed)


def _embed_by_words(texts: Sequence[str], dimensions: int, seed: int) -> np.ndarray:
    if dimensions < 1:
        raise InputError(f"dimensions must be at least 1, got {dimensions}", field="dimensions")
    if not any(character.isalnum() for text in texts for character in text):
        raise InputError(
            "no item text holds a word", field="title", remedy="Give titles in words, or use a sentence encoder."
        )
    # Words of one letter count: titles such as "M" or "Z" have no other.
    weights = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit_transform(texts)
    width = min(dimensions, *weights.shape)
    if weights.shape[1] == 1:  # a single word: TruncatedSVD wants two
        return weights.toarray().astype(np.float32)
    # One thread: sums in a fixed order give the same vectors on every run.
    with threadpool_limits(limits=1), np.errstate(invalid="ignore", divide="ignore"):
        # The ratio of explained variance, which is not used, divides by 0 where all texts are the same.
        vectors = TruncatedSVD(n_components=width, random_state=seed).fit_transform(weights)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _embed_by_sentence_encoder(texts: Sequence[str], path: str) -> np.ndarray:
    if not Path(path).is_dir():
        raise InputError(
            f"there is no local sentence-transformers model at {path!r}",
            field="sentence_transformer",
            remedy="Name the folder of a downloaded model; models are never fetched from a hub here.",
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            "a sentence encoder is named, but sentence-transformers cannot be imported",
            field="sentence_transformer",
            remedy="Install gream[sentence-transformers], or leave the setting out to use TF-IDF.",
        ) from error
    try:
        encoder = SentenceTransformer(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the folder does not load as a sentence-transformers model ({error})",
            file=path,
            field="sentence_transformer",
            remedy="Name a folder that SentenceTransformer.save has written.",
        ) from error
    return np.ascontiguousarray(
        encoder.encode(list(texts), convert_to_numpy=True, show_progress_bar=False), dtype=np.float32
    )
