"""Vectors to codes: residual k-means (RQ-KMeans of GREAM), with plain or balanced clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from item_index.balanced_assignment import balanced_codes, fit_balanced
from item_index.input_error import InputError
from item_index.kmeans import (
    BLOCK_ROWS,
    Centroids,
    add_cluster_sums,
    fit_plain,
    nearest_codes,
    starting_centroids,
)


@dataclass(frozen=True)
class LevelSummary:
    """How one level fits the vectors it was fitted on.

    Attributes:
        codes: size of the level.
        codes_used: codes that hold at least one item.
        largest_cluster: items in the fullest code.
        perplexity: exp of the entropy (nats) of the codes' shares of the items; `codes` when all hold as many.
        mean_squared_residual: mean over items of the squared norm that is left after this level.
    """

    codes: int
    codes_used: int
    largest_cluster: int
    perplexity: float
    mean_squared_residual: float


@dataclass(frozen=True, eq=False)
class ResidualKMeans:
    """H codebooks; each level quantizes what the levels before it have left over.

    Attributes:
        codebooks: per level, float32 [K_l, D].
        training_codes_IH: int32 [items, H], codes of the vectors it was fitted on. With plain clusters these are what
            `encode` gives; with balanced ones an item may sit in a centroid that is not its nearest.
        summaries: one per level.
    """

    codebooks: tuple[np.ndarray, ...]
    training_codes_IH: np.ndarray
    summaries: tuple[LevelSummary, ...]

    @classmethod
    def fit(
        cls,
        vectors_ID: np.ndarray,
        level_sizes: Sequence[int],
        *,
        seed: int,
        balanced: bool = False,
        rounds: int = 25,
        training_items_per_code: int | None = 256,
        device: str = "cpu",
    ) -> ResidualKMeans:
        """Fit one k-means per level on the residuals: R(1) = e, R(l+1) = R(l) - c(l)[s(l)].

        Centroids are trained on a part of a large catalogue; then every item gets a code, in blocks. Memory is for the
        training items' vectors (float32), for the codes, and with `balanced` for the distances of the training items to
        one level's centroids and about 200 bytes an item; never for a copy of all vectors.

        Args:
            vectors_ID: real numbers [items, D]; used in float32. A memory map is read block by block, once or twice a
                level.
            level_sizes: codes K_l of each level.
            seed: the same vectors, seed and number of threads give the same codes in every process.
            balanced: every code of a level gets either the floor or the ceiling of items / K_l items. Their total error
                is near the least that the level's centroids allow, not always the very least.
            rounds: Lloyd's rounds of a level at most; fewer where nothing moves any more.
            training_items_per_code: a catalogue with more items than this many times the largest level trains its
                centroids on that many items, drawn by the seed. 256 cost about 1 % of error against all items; None
                trains on all.
            device: torch device that computes, such as "cpu" or "cuda".

        Raises InputError for no levels, a level without codes, fewer items than codes, rounds or training items below
        one, vectors that are no finite numbers or all the same, or a device that is not there.
        """
        if not level_sizes or min(level_sizes) < 1:
            raise InputError(
                f"level sizes are {list(level_sizes)}",
                field="level_sizes",
                remedy="Give one positive size per level, for example [256, 256, 256, 256].",
            )
        if rounds < 1:
            raise InputError(f"rounds are {rounds}", field="rounds", remedy="Give at least 1.")
        if training_items_per_code is not None and training_items_per_code < 1:
            raise InputError(
                f"training items per code are {training_items_per_code}",
                field="training_items_per_code",
                remedy="Give at least 1, or null to train on all items.",
            )
        source = _Vectors(vectors_ID, device)
        items = source.items
        for level, size in enumerate(level_sizes):
            if items < size:
                raise InputError(
                    f"fewer items than codes: level {level + 1} has {size} codes, but there are {items} items",
                    field="level_sizes",
                    remedy=f"Lower the level's size to {items} or less, or give more items.",
                )
        source.refuse_useless()
        generator = np.random.default_rng(seed)
        wanted = items if training_items_per_code is None else training_items_per_code * max(level_sizes)
        trained = np.sort(generator.choice(items, wanted, replace=False)) if wanted < items else np.arange(items)
        training_ND = source.rows(trained)
        codes_IH = np.zeros((items, len(level_sizes)), dtype=np.int32)
        codebooks: list[torch.Tensor] = []
        summaries = []
        for level, size in enumerate(level_sizes):
            start_KD = starting_centroids(training_ND, size, generator)
            if balanced:
                values_KD, prices_K = fit_balanced(training_ND, start_KD, rounds)
                values_KD = source.assign_evenly(codebooks, values_KD, prices_K, codes_IH)
            else:
                values_KD = fit_plain(training_ND, start_KD, rounds)
                source.assign_nearest(codebooks, values_KD, codes_IH)
            codebooks.append(values_KD)
            own_codes_N = torch.from_numpy(codes_IH[trained, level]).to(training_ND.device)
            for rows_BD, codes_B in zip(training_ND.split(BLOCK_ROWS), own_codes_N.split(BLOCK_ROWS), strict=True):
                rows_BD -= values_KD[codes_B]
            summaries.append(source.summary(codebooks, codes_IH))
        return cls(tuple(values_KD.cpu().numpy() for values_KD in codebooks), codes_IH, tuple(summaries))

    def encode(self, vectors_ID: np.ndarray, *, device: str = "cpu") -> np.ndarray:
        """int32 [items, H]: the nearest centroid level by level, for items old and new.

        Raises InputError for vectors of another width or that are no finite numbers, or a device that is not there.
        """
        source = _Vectors(vectors_ID, device)
        width = self.codebooks[0].shape[1]
        if source.width != width:
            raise InputError(
                f"the vectors have {source.width} dimensions, the codebooks {width}",
                field="vectors",
                remedy="Embed the items as those that the codebooks were fitted on.",
            )
        source.refuse_infinite()
        codes_IH = np.zeros((source.items, len(self.codebooks)), dtype=np.int32)
        codebooks: list[torch.Tensor] = []
        for codebook in self.codebooks:
            values_KD = torch.from_numpy(codebook).to(source.device)
            source.assign_nearest(codebooks, values_KD, codes_IH)
            codebooks.append(values_KD)
        return codes_IH


class _Vectors:
    """The items' vectors and, given codes, their residuals, in blocks on the device.

    Residuals of all items are computed anew for each level rather than kept: beside the distances that costs little.
    """

    def __init__(self, vectors_ID: np.ndarray, device: str) -> None:
        if vectors_ID.ndim != 2 or vectors_ID.dtype.kind not in "fiu":
            raise InputError(
                f"the vectors are an array of {vectors_ID.dtype} of shape {list(vectors_ID.shape)}",
                field="vectors",
                remedy="Give real numbers [items, dimensions].",
            )
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"the device {device!r} cannot be used ({str(error).splitlines()[0]})",
                field="device",
                remedy='Give "cpu", or "cuda" where torch finds a GPU.',
            ) from error
        self.vectors_ID = vectors_ID
        self.items, self.width = vectors_ID.shape

    def rows(self, rows: slice | np.ndarray) -> torch.Tensor:
        """float32 [rows, D] on the device, a copy."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as not finite
            return torch.from_numpy(np.array(self.vectors_ID[rows], dtype=np.float32, order="C")).to(self.device)

    def residuals(
        self, rows: slice | np.ndarray, codebooks: Sequence[torch.Tensor], codes_IH: np.ndarray
    ) -> torch.Tensor:
        """float32 [rows, D]: what the codebooks leave of some items, subtracted level by level."""
        residuals_BD = self.rows(rows)
        for level, values_KD in enumerate(codebooks):
            residuals_BD -= values_KD[torch.from_numpy(codes_IH[rows, level]).to(self.device)]
        return residuals_BD

    def blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK_ROWS) for start in range(0, self.items, BLOCK_ROWS)]

    def refuse_infinite(self) -> None:
        for block in self.blocks():
            finite_B = self.rows(block).isfinite().all(dim=1)
            if not bool(finite_B.all()):
                raise InputError(
                    f"the vector of item row {block.start + int((~finite_B).nonzero()[0, 0])} holds a value that is "
                    "not finite in float32",
                    field="vectors",
                    remedy="Check the encoder's output.",
                )

    def refuse_useless(self) -> None:
        self.refuse_infinite()
        first_D = self.rows(slice(0, 1))
        if self.items > 1 and all(bool((self.rows(block) == first_D).all()) for block in self.blocks()):
            raise InputError(
                f"the vectors of all {self.items} items are the same, so they do not tell the items apart",
                field="vectors",
                remedy="Check that the items' texts differ and that the encoder reads them.",
            )

    def assign_nearest(self, codebooks: Sequence[torch.Tensor], values_KD: torch.Tensor, codes_IH: np.ndarray) -> None:
        """Write the next level's codes: the nearest centroid of each residual."""
        for block in self.blocks():
            codes_B = nearest_codes(self.residuals(block, codebooks, codes_IH), values_KD)
            codes_IH[block, len(codebooks)] = codes_B.cpu().numpy()

    def assign_evenly(
        self, codebooks: Sequence[torch.Tensor], values_KD: torch.Tensor, prices_K: torch.Tensor, codes_IH: np.ndarray
    ) -> torch.Tensor:
        """Write the next level's balanced codes, and return the means of the residuals in each, float32 [K, D]."""
        centroids = Centroids.of(values_KD)

        def distances_of(rows: torch.Tensor) -> torch.Tensor:
            return centroids.squared_distances(self.residuals(rows.numpy(), codebooks, codes_IH))

        codes_I = balanced_codes(distances_of, self.items, len(values_KD), prices_K)
        codes_IH[:, len(codebooks)] = codes_I.cpu().numpy()
        sums_KD = torch.zeros(values_KD.shape, dtype=torch.float64, device=self.device)
        for block in self.blocks():
            add_cluster_sums(sums_KD, self.residuals(block, codebooks, codes_IH), codes_I[block])
        return (sums_KD / torch.bincount(codes_I)[:, None]).float()

    def summary(self, codebooks: Sequence[torch.Tensor], codes_IH: np.ndarray) -> LevelSummary:
        """Of the last of the codebooks."""
        squares = sum(
            float(self.residuals(block, codebooks, codes_IH).square_().sum(dtype=torch.float64))
            for block in self.blocks()
        )
        sizes_K = np.bincount(codes_IH[:, len(codebooks) - 1], minlength=len(codebooks[-1]))
        shares = sizes_K[sizes_K > 0] / self.items
        return LevelSummary(
            codes=len(sizes_K),
            codes_used=len(shares),
            largest_cluster=int(sizes_K.max()),
            perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
            mean_squared_residual=squares / self.items,
        )
