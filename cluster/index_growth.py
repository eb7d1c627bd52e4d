"""`gream index --update`: a changed catalogue keeps its semantic IDs, and newcomers get theirs by the saved encoder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster.index import (
    ENCODER_FOLDER,
    SETTINGS_FILE,
    STAGE_FILE,
    VECTORS_FILE,
    fused_catalogue,
    level_figures,
    read_data,
)
from cluster.progress import console
from cluster.settings import Settings
from cluster.tracking import Tracker
from item_index.catalogue import Catalogue
from item_index.embedding import encoded_blocks, load_encoder
from item_index.growth import grow_index, newcomer_rows
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.vectors import read_vectors, vector_blocks, write_vectors

NEWCOMERS_FILE = "newcomers.parquet"
# Settings of the index stage that may change between an index and its update: where work runs, and what is reserved.
FREE_SETTINGS = {"device", "distributed", "fusion", "spare_collision_codes"}


def update_index_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    """Write a new version of the index for the catalogue as it is now; returns the summary.

    Items that were there keep their semantic IDs, items that left are retired, newcomers take the nearest centroids.
    Their vectors come from the encoder in the index folder. A newcomer has no place in the collaborative block, which
    train interactions of the first index made: zeros there, as for an item without interactions.

    Raises InputError for bad input, a folder without an index, and index settings that differ from those it was made
    with.
    """
    index = SemanticIdIndex.load(folder)
    _check_settings(settings, folder)
    if index.codebooks is None:
        raise InputError(
            "the index has no codebooks, so newcomers cannot be given codes", file=folder,
            remedy="Make the index anew with `gream index`.",
        )  # fmt: skip
    catalogue, sequences = read_data(settings)
    session: Any = nullcontext()
    if settings.index.distributed:
        from cluster.placement import ray_session  # Ray is imported by the stages that use it

        session = ray_session(settings.cluster)
    summary: dict[str, Any] = {}
    with session:
        if settings.index.fusion.url is not None:
            catalogue, summary["text"] = fused_catalogue(settings, catalogue, sequences, folder)
        newcomers = newcomer_rows(index, catalogue.item_ids)
        codes = _newcomer_codes(settings, catalogue.select(newcomers), index.codebooks, folder)
    growth = grow_index(index, catalogue.item_ids, codes, spare_collision_codes=settings.index.spare_collision_codes)
    # Until here nothing of the former index was touched, so a refused or failed update leaves it in use.
    (folder / STAGE_FILE).unlink(missing_ok=True)
    _merge_vectors(growth.index, folder)
    growth.index.save(folder)
    counts = {"added": growth.added, "returned": growth.returned, "retired": growth.retired}
    console.print(
        f"index: version {index.version} -> {growth.index.version}: {growth.added} items added, {growth.returned} "
        f"returned, {growth.retired} retired; {len(catalogue) - growth.added - growth.returned} keep their semantic IDs"
    )
    if growth.tokens_to_add:
        console.print(
            f"index: the reserved collision codes are used up: checkpoints of version {index.version} lack "
            f"{len(growth.tokens_to_add)} tokens, {growth.tokens_to_add[0]} .. {growth.tokens_to_add[-1]}. The corpus "
            "stage adds them to the tokenizer, the sft stage to the model.",
            markup=False,
        )
    else:
        console.print(f"index: checkpoints of version {index.version} have all tokens of the new one")
    tracker.metrics({f"index/{name}": count for name, count in counts.items()})
    summary |= {
        "version": growth.index.version, "former_version": index.version, "items": len(growth.index), **counts,
        "tokens_to_add": list(growth.tokens_to_add), **level_figures(growth.index),
    }  # fmt: skip
    return summary


def _check_settings(settings: Settings, folder: Path) -> None:
    """The index section must be the one that the index was made with."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise InputError(
            "the settings of the index are missing", file=file, remedy="Make the index with `gream index`."
        )
    made_with = yaml.safe_load(file.read_text())
    wanted = settings.model_dump(mode="json")["index"]
    changed = sorted(key for key in wanted if key not in FREE_SETTINGS and wanted[key] != made_with.get(key))
    if changed:
        raise InputError(
            f"index.{changed[0]} is {wanted[changed[0]]!r}, but the index was made with {made_with.get(changed[0])!r}",
            file=file, field=f"index.{changed[0]}",
            remedy="An update keeps encoder and codebooks: undo the change, or make the index anew with `gream index`.",
        )  # fmt: skip


def _newcomer_codes(
    settings: Settings, newcomers: Catalogue, codebooks: tuple[np.ndarray, ...], folder: Path
) -> np.ndarray:
    """int32 [newcomers, H]; leaves their vectors in `newcomers.parquet`."""
    file, width = folder / NEWCOMERS_FILE, codebooks[0].shape[1]
    file.unlink(missing_ok=True)
    if not len(newcomers):
        return np.zeros((0, len(codebooks)), dtype=np.int32)
    if settings.index.distributed:
        from cluster.index_jobs import embed, encode_newcomers

        embed(newcomers, folder / ENCODER_FOLDER, file, settings.cluster)
    else:
        write_vectors(file, encoded_blocks(load_encoder(folder / ENCODER_FOLDER), newcomers))
    text_ID = read_vectors(file)[1]
    # The text block, and zeros for the collaborative one.
    vectors = np.pad(text_ID, ((0, 0), (0, width - text_ID.shape[1])))
    write_vectors(file, vector_blocks(newcomers.item_ids, vectors))
    if settings.index.distributed:
        return encode_newcomers(file, codebooks, settings.cluster, device=settings.index.device)
    from item_index.quantizer import ResidualKMeans  # torch takes seconds to import

    quantizer = ResidualKMeans(codebooks, np.zeros((0, len(codebooks)), dtype=np.int32), ())
    return quantizer.encode(vectors, device=settings.index.device)


def _merge_vectors(index: SemanticIdIndex, folder: Path) -> None:
    """`vectors.parquet` in the new catalogue's order, those of retired items kept behind in case they come back."""
    known_ids, known = read_vectors(folder / VECTORS_FILE)
    newcomers = folder / NEWCOMERS_FILE
    if newcomers.is_file():
        fresh_ids, fresh = read_vectors(newcomers)
        known_ids, known = [*known_ids, *fresh_ids], np.concatenate([known, fresh])
    place = {item_id: row for row, item_id in enumerate(known_ids)}
    ordered = (*index.item_ids, *index.retired_ids)
    write_vectors(folder / VECTORS_FILE, vector_blocks(ordered, known[[place[item_id] for item_id in ordered]]))
    newcomers.unlink(missing_ok=True)
