"""The index stage: item text, fused where an endpoint is named -> vectors -> residual codes -> semantic IDs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.table import Table

from cluster.asking import asker_of, endpoint_of
from cluster.progress import console
from cluster.settings import Settings
from cluster.tracking import Tracker
from curriculum.interactions import UserSequences, build_sequences, load_interactions
from item_index.catalogue import Catalogue
from item_index.collaborative import collaborative_vectors, fuse
from item_index.embedding import (
    Encoder,
    LanguageModelEncoder,
    SentenceTransformerEncoder,
    TfIdfEncoder,
    encoded_blocks,
)
from item_index.fusion import INSTRUCTION, fuse_descriptions
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex, assign_semantic_ids
from item_index.vectors import read_vectors, vector_blocks, write_vectors

if TYPE_CHECKING:
    from item_index.quantizer import LevelSummary

SINGLE_CHILD_WARNING = 0.5
ENCODER_FOLDER, VECTORS_FILE, DESCRIPTIONS_FILE, FUSION_CACHE = (
    "encoder", "vectors.parquet", "descriptions.parquet", "fusion",
)  # fmt: skip
SETTINGS_FILE = "settings.yaml"  # of the index alone: an update must be made with the same ones
STAGE_FILE = "stage.json"  # in every stage's folder once the stage has finished


def read_data(settings: Settings) -> tuple[Catalogue, UserSequences]:
    """The filtered catalogue and the users' sequences; raises InputError for bad input."""
    catalogue = Catalogue.load(settings.data.items)
    interactions = load_interactions(settings.data.interactions, catalogue)
    return build_sequences(
        interactions, catalogue, minimum_interactions=settings.data.minimum_interactions, seed=settings.seed
    )


def index_stage(settings: Settings, folder: Path, tracker: Tracker) -> dict[str, Any]:
    """Write the index, and beside it `encoder/`, `vectors.parquet` and, where text was fused, `descriptions.parquet`.

    Returns the summary. Raises InputError for bad input and settings, before the endpoint is asked where that can be
    known.
    """
    catalogue, sequences = read_data(settings)
    wanted = settings.index
    too_large = [size for size in wanted.level_sizes if size > len(catalogue)]
    if too_large:
        raise InputError(
            f"{len(catalogue)} items are fewer than the {too_large[0]} codes of a level", file=settings.data.items,
            field="index.level_sizes", remedy="Ask for fewer codes.",
        )  # fmt: skip
    trained_encoder = _trained_encoder(settings)
    # What a run with other settings left here must not be taken for this one's.
    if (folder / ENCODER_FOLDER).is_dir():
        shutil.rmtree(folder / ENCODER_FOLDER)
    (folder / DESCRIPTIONS_FILE).unlink(missing_ok=True)
    session: Any = nullcontext()
    if wanted.distributed:
        from cluster.placement import ray_session  # Ray is imported by the stages that use it

        session = ray_session(settings.cluster)
    summary: dict[str, Any] = {}
    with session:
        if wanted.fusion.url is not None:
            catalogue, summary["text"] = fused_catalogue(settings, catalogue, sequences, folder)
        encoder = trained_encoder or TfIdfEncoder.fit(
            catalogue, dimensions=wanted.embedding_dimensions, seed=settings.seed, fit_items=wanted.fit_items
        )
        encoder.save(folder / ENCODER_FOLDER)
        vectors = _vectors(settings, encoder, catalogue, sequences, folder)
    from item_index.quantizer import ResidualKMeans  # torch takes seconds to import

    quantizer = ResidualKMeans.fit(
        vectors, wanted.level_sizes, seed=settings.seed, balanced=wanted.balanced, rounds=wanted.rounds,
        training_items_per_code=wanted.training_items_per_code, device=wanted.device,
    )  # fmt: skip
    index = assign_semantic_ids(
        catalogue.item_ids, quantizer.training_codes_IH, wanted.level_sizes,
        spare_collision_codes=wanted.spare_collision_codes, codebooks=quantizer.codebooks,
    )  # fmt: skip
    index.save(folder)
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump(wanted.model_dump(mode="json"), sort_keys=False))
    colliding = int((index.lengths_I > index.levels).sum())
    summary |= {
        "version": index.version, "items": len(index), "colliding": colliding, "embedding": wanted.embedding,
        "dimensions": vectors.shape[1], "clusters": [asdict(level) for level in quantizer.summaries],
        **level_figures(index),
    }  # fmt: skip
    console.print(_table_of_text_and_vectors(summary, settings))
    console.print(_table_of_clusters(quantizer.summaries))
    tracker.metrics(
        {f"index/{name.replace(',', '').replace(' ', '_')}": count for name, count in summary.get("text", {}).items()}
        | {"index/colliding": colliding, "index/dimensions": vectors.shape[1]}
    )
    return summary


def _trained_encoder(settings: Settings) -> Encoder | None:
    """The encoder whose model lies in a folder; None for TF-IDF, which learns from the text after fusion."""
    wanted = settings.index
    if wanted.encoder_path is None:
        return None
    if wanted.embedding == "sentence_transformer":
        return SentenceTransformerEncoder(wanted.encoder_path)
    return LanguageModelEncoder(
        wanted.encoder_path, maximum_tokens=wanted.encoder_tokens, batch_tokens=wanted.encoder_batch_tokens
    )


def fused_catalogue(
    settings: Settings, catalogue: Catalogue, sequences: UserSequences, folder: Path
) -> tuple[Catalogue, dict[str, int]]:
    """The catalogue with fused descriptions, and the counts with failures by reason and cost; `descriptions.parquet`
    says which item has which."""
    wanted = settings.index.fusion
    _check_reviewers(settings, catalogue, sequences)
    endpoint = endpoint_of(wanted, section="index.fusion", instruction=INSTRUCTION)
    fused = fuse_descriptions(
        catalogue, trains_on=sequences.trains_on, key_of=endpoint.cache_key,
        cache=Path(wanted.cache or folder / FUSION_CACHE),
        ask=asker_of(endpoint, "fusion", settings.cluster, distributed=settings.index.distributed),
    )  # fmt: skip
    columns = {"item_id": catalogue.item_ids, "description": fused.descriptions, "source": fused.sources}
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), folder / DESCRIPTIONS_FILE)
    for failure in fused.failures:
        console.print(f"fusion: warning: {failure}", markup=False, highlight=False)
    if fused.counts["failed"]:
        console.print(
            f"fusion: {fused.counts['failed']} items keep their raw description; to ask for them again, remove "
            f"{folder / STAGE_FILE} and give the same command once more"
        )
    failed = {f"failed, {reason}": count for reason, count in fused.failures_by_reason.items()}
    return replace(catalogue, descriptions=fused.descriptions), fused.counts | failed | fused.cost


def _check_reviewers(settings: Settings, catalogue: Catalogue, sequences: UserSequences) -> None:
    """User ids of another kind than the interactions' would make every review unusable without a word."""
    reviewer = next((review.user_id for reviews in catalogue.reviews for review in reviews), None)
    if reviewer is not None and isinstance(reviewer, str) != isinstance(sequences.user_ids[0], str):
        raise InputError(
            f"the reviews' user ids are like {reviewer!r}, the interactions' like {sequences.user_ids[0]!r}",
            file=settings.data.items, field="reviews", remedy="Store them as the same kind in both tables.",
        )  # fmt: skip


def _vectors(
    settings: Settings, encoder: Encoder, catalogue: Catalogue, sequences: UserSequences, folder: Path
) -> np.ndarray:
    """float32 [items, D], as `vectors.parquet` then holds them: text, and the collaborative block if there is one."""
    wanted, file = settings.index, folder / VECTORS_FILE
    if wanted.distributed:
        from cluster.index_jobs import embed

        embed(catalogue, folder / ENCODER_FOLDER, file, settings.cluster)
    else:
        write_vectors(file, encoded_blocks(encoder, catalogue))
    vectors = read_vectors(file)[1]
    if wanted.collaborative_weight == 0:
        return vectors
    collaborative = collaborative_vectors(
        sequences.train_matrix(len(catalogue)), dimensions=wanted.collaborative_dimensions, seed=settings.seed
    )
    fused = fuse(vectors, collaborative, weight=wanted.collaborative_weight)
    write_vectors(file, vector_blocks(catalogue.item_ids, fused))
    return fused


def level_figures(index: SemanticIdIndex) -> dict[str, Any]:
    """Prints how much choice each level holds; returns the same figures."""
    trie = index.trie
    table = Table(
        title=f"index {index.version}: {len(index)} items, {int((index.lengths_I > index.levels).sum())} colliding"
    )
    for column in ("level", "nodes", "mean degree", "single-child share"):
        table.add_column(column, justify="right")
    figures: dict[str, Any] = {}
    for level in range(index.levels):
        degrees = np.diff(trie.child_start[trie.level_start[level] : trie.level_start[level + 1] + 1])
        degrees = degrees[degrees > 0]
        single = float((degrees == 1).mean())
        table.add_row(str(level + 1), str(len(degrees)), f"{degrees.mean():.2f}", f"{single:.2f}")
        figures[f"level_{level + 1}"] = {"mean_degree": float(degrees.mean()), "single_child_share": single}
        if single > SINGLE_CHILD_WARNING and level < index.levels - 1:
            console.print(
                f"index: warning: {single:.0%} of the nodes above level {level + 1} have a single child, so that level "
                "holds little choice; use fewer codes or levels (index.level_sizes)"
            )
    console.print(table)
    return figures


def _table_of_clusters(summaries: Sequence[LevelSummary]) -> Table:
    """How each level of codes fits the vectors."""
    table = Table(title="clusters")
    for column in ("level", "codes used", "perplexity", "largest cluster", "mean squared residual"):
        table.add_column(column, justify="right")
    for level, fit in enumerate(summaries):
        used, error = f"{fit.codes_used} of {fit.codes}", f"{fit.mean_squared_residual:.4g}"
        table.add_row(str(level + 1), used, f"{fit.perplexity:.1f}", str(fit.largest_cluster), error)
    return table


def _table_of_text_and_vectors(summary: dict[str, Any], settings: Settings) -> Table:
    wanted = settings.index
    collaborative = f"weight {wanted.collaborative_weight:g}" if wanted.collaborative_weight else "none"
    rows: dict[str, Any] = {"items": summary["items"]}
    rows |= {f"descriptions: {name}": count for name, count in summary.get("text", {}).items()}
    rows |= {
        "embedding": wanted.embedding,
        "dimensions": summary["dimensions"],
        "collaborative block": collaborative,
    }
    table = Table(title="text and vectors", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
