"""Semantic IDs: the codes of every item, their tokens, and the versioned folder that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from item_index.input_error import InputError
from item_index.trie import ItemTrie

FORMAT_VERSION = 2
PADDING = -1
LEVEL_LETTERS = "abcdefghijklmnopqrstuvwxyz"
CODES_FILE, CODEBOOKS_FILE, TRIE_FILE = "semantic_ids.parquet", "codebooks.safetensors", "trie.safetensors"
MANIFEST_FILE, CURRENT_FILE, VERSIONS_FOLDER = "manifest.json", "current.json", "versions"
_REMEDY = "Copy the folder again, or run the index stage anew."


@dataclass(frozen=True, eq=False)
class SemanticIdIndex:
    """The semantic ID of every item of a catalogue.

    Attributes:
        item_ids: the user's ids, row by row.
        codes_IL: int32 [items, depth]; a row holds its H residual codes and, where items collide, the collision code;
            -1 beyond a row's length.
        lengths_I: int32 [items], codes of each row: H or H + 1.
        level_sizes: codes of each of the H residual levels.
        collision_size: collision codes that have a token, used and spare.
        codebooks: per level, float32 [K_l, D], to encode newcomers with; None where the codes came from elsewhere.
        retired_ids: ids of items that left the catalogue; their semantic IDs are never given to another item.
        retired_codes_RL, retired_lengths_R: int32 [retired, depth] and [retired], as for the items.
    """

    item_ids: tuple[str | int, ...]
    codes_IL: np.ndarray
    lengths_I: np.ndarray
    level_sizes: tuple[int, ...]
    collision_size: int
    codebooks: tuple[np.ndarray, ...] | None = None
    retired_ids: tuple[str | int, ...] = ()
    retired_codes_RL: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int32))
    retired_lengths_R: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def __post_init__(self) -> None:
        if len(self.level_sizes) >= len(LEVEL_LETTERS):
            raise InputError(
                f"{len(self.level_sizes)} levels, and only {len(LEVEL_LETTERS) - 1} can be named",
                field="level_sizes",
                remedy="Use fewer levels.",
            )
        if self.codes_IL.shape != (len(self.item_ids), self.depth) or self.depth - self.levels not in (0, 1):
            raise ValueError(
                f"codes of shape {self.codes_IL.shape} for {len(self.item_ids)} items and {self.levels} levels"
            )
        sizes = np.array([*self.level_sizes, self.collision_size])[: self.depth]
        used = np.arange(self.depth) < self.lengths_I[:, None]
        if (self.lengths_I < self.levels).any() or (self.lengths_I > self.depth).any():
            raise ValueError(f"lengths must lie in {self.levels}..{self.depth}")
        if ((self.codes_IL >= sizes) | (self.codes_IL < 0))[used].any() or (self.codes_IL[~used] != PADDING).any():
            raise ValueError(
                f"codes must lie below the level sizes {sizes.tolist()} and be {PADDING} beyond the length"
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def levels(self) -> int:
        """H, the number of residual levels."""
        return len(self.level_sizes)

    @property
    def depth(self) -> int:
        """Codes of the longest semantic ID: H + 1 if any items collide, else H."""
        return int(self.codes_IL.shape[1])

    @cached_property
    def version(self) -> str:
        """First 16 hex digits of a SHA-256 over ids, codes and sizes, those of retired items too: the same content has
        the same version."""
        head = {"item_ids": self.item_ids, "level_sizes": self.level_sizes, "collision_size": self.collision_size}
        digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        digest.update(self.lengths_I.astype("<i4").tobytes())
        digest.update(self.codes_IL.astype("<i4").tobytes())
        if self.retired_ids:
            digest.update(json.dumps(self.retired_ids, separators=(",", ":")).encode())
            digest.update(self.retired_lengths_R.astype("<i4").tobytes())
            digest.update(self.retired_codes_RL.astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def token(self, level: int, code: int) -> str:
        """Token of a code, such as `<|a_12|>`; `level` counts from 0, and H is the level of collisions."""
        sizes = (*self.level_sizes, self.collision_size)
        if not (0 <= level < len(sizes) and 0 <= code < sizes[level]):
            raise ValueError(f"no code {code} at level {level}; the level sizes are {sizes}")
        return f"<|{LEVEL_LETTERS[level]}_{code}|>"

    def tokens(self) -> list[list[str]]:
        """All tokens, level by level; the collision level comes last where it has any codes."""
        sizes = [*self.level_sizes, *([self.collision_size] if self.collision_size else [])]
        return [[self.token(level, code) for code in range(size)] for level, size in enumerate(sizes)]

    def text(self, row: int) -> str:
        """The item's tokens, one after the other."""
        return "".join(self.token(level, int(self.codes_IL[row, level])) for level in range(self.lengths_I[row]))

    @cached_property
    def row_of_codes(self) -> dict[tuple[int, ...], int]:
        """The item's row by all codes of its semantic ID."""
        rows = zip(self.codes_IL.tolist(), self.lengths_I.tolist(), strict=True)
        return {tuple(codes[:length]): row for row, (codes, length) in enumerate(rows)}

    @cached_property
    def trie(self) -> ItemTrie:
        """The trie of all items; mapped from its file where the index was loaded from a folder."""
        return ItemTrie.build(self.codes_IL, self.lengths_I)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write this version into `folder/versions/<version>` and then make it the current one.

        Earlier versions stay, so that what was recorded under them can still be read. A write that is cut short leaves
        the current version as it was: the manifest, with the hash of every other file, comes last, and the file that
        names the current version is replaced in one move.
        """
        target = Path(folder) / VERSIONS_FOLDER / self.version
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST_FILE).unlink(missing_ok=True)
        for name in (CODES_FILE, CODEBOOKS_FILE, TRIE_FILE):
            (target / name).unlink(missing_ok=True)  # a process may still have the old one mapped
        retired = len(self.retired_ids)
        codes, lengths = self.codes_IL, self.lengths_I
        if retired:
            codes, lengths = np.concatenate([codes, self.retired_codes_RL]), np.r_[lengths, self.retired_lengths_R]
        columns = {
            "item_id": pa.array([*self.item_ids, *self.retired_ids]),
            "codes": pa.ListArray.from_arrays(
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                codes[np.arange(self.depth) < lengths[:, None]],
            ),
            "retired": pa.array(np.arange(len(lengths)) >= len(self)),
        }
        pq.write_table(pa.table(columns), target / CODES_FILE)
        self.trie.save(target / TRIE_FILE)
        names = [CODES_FILE, TRIE_FILE]
        if self.codebooks is not None:
            tensors = {f"level_{level}": np.ascontiguousarray(book) for level, book in enumerate(self.codebooks)}
            safetensors.numpy.save_file(tensors, target / CODEBOOKS_FILE)
            names.append(CODEBOOKS_FILE)
        manifest = {
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "items": len(self),
            "retired": retired,
            "level_sizes": list(self.level_sizes),
            "collision_size": self.collision_size,
            "sha256": {name: _sha256(target / name) for name in names},
        }
        _write_json(target / MANIFEST_FILE, manifest)
        _write_json(Path(folder) / CURRENT_FILE, {"version": self.version})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, version: str | None = None) -> SemanticIdIndex:
        """Read the current version of an index folder, or the one that is named (that of a recorded rollout, say).

        Raises InputError that names the file which is missing or does not match, or the versions that are there.
        """
        if version is None:
            current = _read_json(Path(folder) / CURRENT_FILE, "the folder holds no index", "Run the index stage first.")
            version = str(current.get("version"))
        source = Path(folder) / VERSIONS_FOLDER / version
        if not source.is_dir():
            known = sorted(path.parent.name for path in source.parent.glob(f"*/{MANIFEST_FILE}"))
            raise InputError(
                f"there is no index version {version} here, only {', '.join(known) or 'none'}",
                file=folder,
                field="version",
                remedy="Copy that version's folder here, or use the index that the data was made with.",
            )
        manifest = _read_json(source / MANIFEST_FILE, "the version's manifest is missing", _REMEDY)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"format version {manifest.get('format_version')}, and this release reads {FORMAT_VERSION}",
                file=source / MANIFEST_FILE,
                field="format_version",
                remedy="Run the index stage anew, or use the release that wrote the index.",
            )
        missing = {"version", "level_sizes", "collision_size", "sha256"} - set(manifest)
        if missing or not {CODES_FILE, TRIE_FILE} <= set(manifest["sha256"]):
            raise InputError(
                f"the manifest lacks {', '.join(sorted(missing)) or 'the hash of a file'}",
                file=source / MANIFEST_FILE,
                remedy=_REMEDY,
            )
        for name, expected in manifest["sha256"].items():
            if not (source / name).is_file():
                raise InputError("the index lacks this file", file=source / name, remedy=_REMEDY)
            if _sha256(source / name) != expected:
                raise InputError(
                    "the content does not match the manifest's SHA-256", file=source / name, remedy=_REMEDY
                )
        table = pq.read_table(source / CODES_FILE)
        lists = table.column("codes").combine_chunks()
        level_sizes = tuple(manifest["level_sizes"])
        lengths = np.diff(lists.offsets.to_numpy()).astype(np.int32)
        codes = np.full((len(lengths), int(lengths.max(initial=len(level_sizes)))), PADDING, dtype=np.int32)
        codes[np.arange(codes.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
        item_ids = table.column("item_id").to_pylist()
        codebooks = None
        if CODEBOOKS_FILE in manifest["sha256"]:
            tensors = safetensors.numpy.load_file(source / CODEBOOKS_FILE)
            codebooks = tuple(tensors[f"level_{level}"] for level in range(len(level_sizes)))
        items = int(np.count_nonzero(~table.column("retired").to_numpy()))
        index = cls(
            item_ids=tuple(item_ids[:items]),
            codes_IL=codes[:items],
            lengths_I=lengths[:items],
            level_sizes=level_sizes,
            collision_size=manifest["collision_size"],
            codebooks=codebooks,
            retired_ids=tuple(item_ids[items:]),
            retired_codes_RL=codes[items:],
            retired_lengths_R=lengths[items:],
        )
        if not index.version == manifest["version"] == version:
            raise InputError(
                f"the content is version {index.version}, the manifest says {manifest['version']}, "
                f"the folder {version}",
                file=source / MANIFEST_FILE,
                field="version",
                remedy=_REMEDY,
            )
        vars(index)["trie"] = ItemTrie.load(source / TRIE_FILE)
        return index


def assign_semantic_ids(
    item_ids: Sequence[str | int],
    residual_codes_IH: np.ndarray,
    level_sizes: Sequence[int],
    *,
    spare_collision_codes: int = 8,
    codebooks: Sequence[np.ndarray] | None = None,
) -> SemanticIdIndex:
    """Give every item a semantic ID of its own.

    Items that share all H codes all get a further code, 0, 1, 2, ... in the order of their rows.

    Args:
        item_ids: distinct ids, one per row.
        residual_codes_IH: integers [items, H], each below its level's size.
        level_sizes: K_l of the H levels.
        spare_collision_codes: collision codes with a token that no item has yet, for newcomers.
        codebooks: per level, float32 [K_l, D], kept with the index.

    Raises ValueError for repeated ids, shapes that do not fit or codes outside their level.
    """
    residual_codes = np.asarray(residual_codes_IH)
    items = len(item_ids)
    if residual_codes.shape != (items, len(level_sizes)):
        raise ValueError(f"codes of shape {residual_codes.shape} for {items} items and {len(level_sizes)} levels")
    if len(set(item_ids)) != items:
        raise ValueError("item ids must be distinct")
    _, group, counts = np.unique(residual_codes, axis=0, return_inverse=True, return_counts=True)
    by_group = np.argsort(group, kind="stable")
    first_of_group = np.cumsum(counts) - counts
    ordinal = np.empty(items, dtype=np.int32)
    ordinal[by_group] = np.arange(items) - np.repeat(first_of_group, counts)
    collides = counts[group] > 1
    codes = residual_codes.astype(np.int32)
    if collides.any():
        codes = np.column_stack([codes, np.where(collides, ordinal, PADDING).astype(np.int32)])
    return SemanticIdIndex(
        item_ids=tuple(item_ids),
        codes_IL=codes,
        lengths_I=(len(level_sizes) + collides).astype(np.int32),
        level_sizes=tuple(int(size) for size in level_sizes),
        collision_size=int(ordinal[collides].max(initial=-1)) + 1 + spare_collision_codes,
        codebooks=None if codebooks is None else tuple(codebooks),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """In one move, so that no reader finds half a file."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def _read_json(path: Path, missing: str, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(missing, file=path, remedy=remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"the file is not JSON ({error})", file=path, remedy=_REMEDY) from error
    if not isinstance(content, dict):
        raise InputError("the file does not hold a JSON object", file=path, remedy=_REMEDY)
    return content
