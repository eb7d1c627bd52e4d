"""Item text to vectors by an encoder that can be saved, so that newcomers meet the very same one later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from item_index.catalogue import Catalogue
from item_index.input_error import InputError
from item_index.text import clean_text, item_texts

ENCODER_FILE, TERMS_FILE, TENSORS_FILE = "encoder.json", "terms.json", "tf_idf.safetensors"
FORMAT_VERSION = 1
# Items that are encoded at once. Results of a neural encoder can differ in the last digit with the batch they were
# computed in, so every path through the project cuts the catalogue into the same blocks.
BLOCK_ITEMS = 1024
# TF-IDF: the most frequent words and pairs of words; a catalogue of millions of items would bring tens of millions.
MOST_TERMS = 200_000


class Encoder(Protocol):
    """Turns items into vectors."""

    def encode(self, items: Catalogue) -> np.ndarray:
        """float32 [items, D]; D is the same for every call."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_encoder` needs."""


class TfIdfEncoder:
    """TF-IDF over words and pairs of words of the whole passage, reduced by a truncated SVD.

    Attributes:
        terms: the words and pairs of words, in the order of the columns.
        inverse_frequencies_T: float64 [terms].
        components_DT: float32 [D, terms].
    """

    def __init__(self, terms: list[str], inverse_frequencies_T: np.ndarray, components_DT: np.ndarray) -> None:
        self.terms, self.inverse_frequencies_T, self.components_DT = terms, inverse_frequencies_T, components_DT
        self._vectorizer = _vectorizer(vocabulary=terms)
        self._vectorizer.idf_ = inverse_frequencies_T

    @classmethod
    def fit(cls, items: Catalogue, *, dimensions: int, seed: int, fit_items: int = 50_000) -> TfIdfEncoder:
        """Learn terms, frequencies and components.

        Args:
            items: the catalogue.
            dimensions: D; fewer where the catalogue has fewer items or words.
            seed: of the sample and of the randomised SVD.
            fit_items: items to learn from at most, drawn by the seed, so that a large catalogue needs no more memory.

        Raises InputError for no items, texts without a single word, and dimensions below 1.
        """
        if dimensions < 1:
            raise InputError(f"dimensions must be at least 1, got {dimensions}", field="embedding_dimensions")
        if len(items) == 0:
            raise InputError("there are no items to embed", remedy="Give a catalogue with at least one item.")
        if len(items) > fit_items:
            items = items.select(np.sort(np.random.default_rng(seed).choice(len(items), fit_items, replace=False)))
        texts = item_texts(items)
        if not any(character.isalnum() for text in texts for character in text):
            raise InputError(
                "no item text holds a word", field="title", remedy="Give titles in words, or use a sentence encoder."
            )
        vectorizer = _vectorizer(max_features=MOST_TERMS)
        weights = vectorizer.fit_transform(texts)
        if weights.shape[1] == 1:  # a single word: TruncatedSVD wants two
            components = np.ones((1, 1))
        else:
            # One thread: sums in a fixed order give the same vectors on every run.
            with threadpool_limits(limits=1), np.errstate(invalid="ignore", divide="ignore"):
                # The ratio of explained variance, which is not used, divides by 0 where all texts are the same.
                reduction = TruncatedSVD(n_components=min(dimensions, *weights.shape), random_state=seed).fit(weights)
            components = reduction.components_
        return cls(
            vectorizer.get_feature_names_out().tolist(),
            vectorizer.idf_,
            np.ascontiguousarray(components, dtype=np.float32),
        )

    def encode(self, items: Catalogue) -> np.ndarray:
        """float32 [items, D]; every row depends on its own text alone, and one without a known word is zero."""
        weights = self._vectorizer.transform(item_texts(items))
        return np.ascontiguousarray(weights @ self.components_DT.T, dtype=np.float32)

    def save(self, folder: str | os.PathLike[str]) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / TERMS_FILE).write_text(json.dumps(self.terms, ensure_ascii=False), encoding="utf-8")
        tensors = {"inverse_frequencies": self.inverse_frequencies_T, "components": self.components_DT}
        safetensors.numpy.save_file(tensors, target / TENSORS_FILE)
        _write_description(target, {"kind": "tf_idf"})

    @classmethod
    def load(cls, folder: Path) -> TfIdfEncoder:
        tensors = safetensors.numpy.load_file(folder / TENSORS_FILE)
        terms = json.loads((folder / TERMS_FILE).read_text(encoding="utf-8"))
        return cls(terms, tensors["inverse_frequencies"], tensors["components"])


class SentenceTransformerEncoder:
    """A sentence-transformers model in a local folder, over the whole passage; D is the model's. Nothing is downloaded.

    Raises InputError for a folder that is not there; the model itself is loaded by the first `encode`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _local_folder(path)

    def encode(self, items: Catalogue) -> np.ndarray:
        """float32 [items, D]. Raises InputError where the package is missing or the folder does not load."""
        vectors = self._model.encode(item_texts(items), convert_to_numpy=True, show_progress_bar=False)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The model's path and hash, not its weights."""
        _write_description(Path(folder), {"kind": "sentence_transformer", **_model_reference(self.path)})

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> SentenceTransformerEncoder:
        return cls(_checked_model(folder, description))

    @cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                "a sentence encoder is asked for, but sentence-transformers cannot be imported",
                field="index.embedding",
                remedy="Install gream[sentence-transformers], or use another encoder.",
            ) from error
        try:
            return SentenceTransformer(str(self.path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the folder does not load as a sentence-transformers model ({error})",
                file=self.path,
                field="index.encoder_path",
                remedy="Name a folder that SentenceTransformer.save has written.",
            ) from error


class LanguageModelEncoder:
    """The un-tuned backbone as GREAM uses it (section 1.3): mean pooling of a causal language model's last hidden
    states under the attention mask, title and description apart and averaged, not normalised.

    Args:
        path: local Hugging Face folder with safetensors weights; no code of it is run.
        maximum_tokens: of a title or a description; the rest is cut.
        batch_tokens: padded tokens of one forward pass at most.

    Raises InputError for a folder that is not there; the model itself is loaded by the first `encode`.
    """

    def __init__(self, path: str | os.PathLike[str], *, maximum_tokens: int = 512, batch_tokens: int = 16_384) -> None:
        self.path, self.maximum_tokens, self.batch_tokens = _local_folder(path), maximum_tokens, batch_tokens

    def encode(self, items: Catalogue) -> np.ndarray:
        """float32 [items, D], D the model's width; an item without a description has its title's vector.

        Raises InputError that names the item whose title and description hold no token.
        """
        tokenizer, model = self._loaded
        titles, descriptions = ([clean_text(text) for text in texts] for texts in (items.titles, items.descriptions))
        tokens = [
            tokenizer(text, truncation=True, max_length=self.maximum_tokens)["input_ids"] if text else []
            for text in (*titles, *descriptions)
        ]
        pooled = self._pooled(tokens, model)
        present = np.array([len(row) > 0 for row in tokens]).reshape(2, len(items))
        empty = np.nonzero(~present.any(axis=0))[0]
        if empty.size:
            raise InputError(
                f"the text of item {items.item_ids[empty[0]]!r} holds no token",
                field="title",
                remedy="Give the item a title in words.",
            )
        sums = pooled.reshape(2, len(items), -1).sum(axis=0)  # a missing part is zero
        return np.ascontiguousarray(sums / present.sum(axis=0)[:, None], dtype=np.float32)

    def _pooled(self, tokens: list[list[int]], model: Any) -> np.ndarray:
        """float32 [texts, D]: the mean over each text's own tokens, zero for a text without any."""
        import torch  # only this encoder needs it, and it takes seconds to import

        lengths = np.array([len(row) for row in tokens])
        pooled = np.zeros((len(tokens), model.config.hidden_size), dtype=np.float32)
        for rows in _batches(lengths, self.batch_tokens):
            longest = int(lengths[rows].max())
            # Padding is on the right, where a causal model's own tokens do not see it, so any token will do.
            input_ids = np.zeros((len(rows), longest), dtype=np.int64)
            mask = np.arange(longest) < lengths[rows][:, None]
            input_ids[mask] = [token for row in rows for token in tokens[row]]
            with torch.inference_mode():
                mask_BT = torch.from_numpy(mask).to(model.device)
                ids_BT = torch.from_numpy(input_ids).to(model.device)
                hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state.float()
                summed_BD = (hidden_BTD * mask_BT[:, :, None]).sum(dim=1)
                pooled[rows] = (summed_BD / mask_BT.sum(dim=1)[:, None]).cpu().numpy()
        return pooled

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The model's path and hash, not its weights."""
        limits = {"maximum_tokens": self.maximum_tokens, "batch_tokens": self.batch_tokens}
        _write_description(Path(folder), {"kind": "language_model", **limits, **_model_reference(self.path)})

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> LanguageModelEncoder:
        return cls(
            _checked_model(folder, description),
            maximum_tokens=description["maximum_tokens"],
            batch_tokens=description["batch_tokens"],
        )

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and model, on the GPU where there is one."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, **local)
            model = AutoModel.from_pretrained(self.path, use_safetensors=True, dtype=torch.float32, **local)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the folder does not load as a language model ({error})",
                file=self.path,
                field="index.encoder_path",
                remedy="Name a Hugging Face checkpoint with its tokenizer and safetensors weights.",
            ) from error
        return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_encoder(folder: str | os.PathLike[str]) -> Encoder:
    """The encoder that `save` wrote. Raises InputError for a folder without one, or a model that is gone or changed."""
    source = Path(folder)
    file = source / ENCODER_FILE
    if not file.is_file():
        raise InputError("the folder holds no encoder", file=file, remedy="Run the index stage first.")
    description = json.loads(file.read_text(encoding="utf-8"))
    loaders: dict[str, Callable[[], Encoder]] = {
        "tf_idf": lambda: TfIdfEncoder.load(source),
        "sentence_transformer": lambda: SentenceTransformerEncoder.load(source, description),
        "language_model": lambda: LanguageModelEncoder.load(source, description),
    }
    if description["format_version"] != FORMAT_VERSION or description["kind"] not in loaders:
        raise InputError(
            f"format version {description['format_version']} of kind {description['kind']!r} is not known to this "
            "release",
            file=file,
            remedy="Run the index stage anew.",
        )
    return loaders[description["kind"]]()


def encoded_blocks(encoder: Encoder, items: Catalogue) -> Iterator[tuple[tuple[str | int, ...], np.ndarray]]:
    """(item ids, vectors [rows, D]) block by block, as `item_index.vectors.write_vectors` takes them."""
    for start in range(0, len(items), BLOCK_ITEMS):
        block = items.select(np.arange(start, min(start + BLOCK_ITEMS, len(items))))
        yield block.item_ids, encoder.encode(block)


def _vectorizer(**more: Any) -> TfidfVectorizer:
    # Words of one letter count: titles such as "M" or "Z" have no other.
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", **more)


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows of similar length together, rows without tokens left out; at least one row, else `batch_tokens` at most."""
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and int(lengths[order[end]]) * (end + 1 - start) <= batch_tokens:
            end += 1
        yield order[start:end]
        start = end


def _local_folder(path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_dir():
        raise InputError(
            "there is no such model folder",
            file=path,
            field="index.encoder_path",
            remedy="Name the folder of a downloaded model; models are never fetched from a hub here.",
        )
    return Path(path).resolve()


def _model_reference(path: Path) -> dict[str, str]:
    """Path of a model and a hash of its files, so that another model in its place is noticed."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(str(file.relative_to(path)).encode() + hashlib.file_digest(content, "sha256").digest())
    return {"path": str(path), "sha256": digest.hexdigest()}


def _checked_model(folder: Path, description: dict[str, Any]) -> Path:
    path = _local_folder(description["path"])
    if _model_reference(path)["sha256"] != description["sha256"]:
        raise InputError(
            f"the model in {path} has changed since the encoder was saved",
            file=folder / ENCODER_FILE,
            remedy="Put the old model back, or run the index stage anew.",
        )
    return path


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format_version": FORMAT_VERSION, **description}, indent=2)
    (folder / ENCODER_FILE).write_text(text + "\n", encoding="utf-8")
