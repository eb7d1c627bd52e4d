from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from item_index.input_error import InputError
from item_index.kmeans import BLOCK_ROWS, MOST_SAVED, fit_plain, move_idle_centroids, nearest_codes, starting_centroids
from item_index.quantizer import ResidualKMeans


def clustered(items: int = 120, dimensions: int = 5, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(6, dimensions)) * 4
    return (centres[generator.integers(6, size=items)] + generator.normal(size=(items, dimensions))).astype(np.float32)


def encode_one_by_one(quantizer: ResidualKMeans, vectors: np.ndarray) -> np.ndarray:
    codes = []
    for vector in vectors.astype(np.float64):
        residual, row = vector, []
        for codebook in quantizer.codebooks:
            code = int(np.argmin([np.sum((residual - centroid) ** 2) for centroid in codebook.astype(np.float64)]))
            residual = residual - codebook[code]
            row.append(code)
        codes.append(row)
    return np.array(codes)


def test_encode_takes_the_nearest_centroid_level_by_level() -> None:
    quantizer = ResidualKMeans.fit(clustered(), (6, 4, 3), seed=0)
    newcomers = clustered(seed=1)
    codes = quantizer.encode(newcomers)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, encode_one_by_one(quantizer, newcomers))


def test_plain_training_codes_are_what_encode_gives() -> None:
    vectors = clustered()
    quantizer = ResidualKMeans.fit(vectors, (6, 4, 3), seed=0)
    np.testing.assert_array_equal(quantizer.encode(vectors), quantizer.training_codes_IH)


def test_codebooks_have_the_level_sizes() -> None:
    quantizer = ResidualKMeans.fit(clustered(), (6, 4, 3), seed=0)
    assert [book.shape for book in quantizer.codebooks] == [(6, 5), (4, 5), (3, 5)]
    assert {book.dtype for book in quantizer.codebooks} == {np.dtype(np.float32)}


@pytest.mark.parametrize("balanced", [False, True])
def test_summaries_agree_with_codes_and_codebooks(balanced: bool) -> None:
    vectors = clustered()
    quantizer = ResidualKMeans.fit(vectors, (6, 4, 3), seed=0, balanced=balanced)
    residuals = vectors.astype(np.float64)
    left = []
    for level, summary in enumerate(quantizer.summaries):
        codes = quantizer.training_codes_IH[:, level]
        residuals = residuals - quantizer.codebooks[level][codes]
        left.append(np.mean(np.sum(residuals**2, axis=1)))
        assert summary.mean_squared_residual == pytest.approx(left[-1])
        assert summary.codes_used == len(set(codes.tolist()))
        assert summary.largest_cluster == np.bincount(codes).max()
        assert summary.codes == (6, 4, 3)[level]
        shares = np.bincount(codes) / len(codes)
        entropy = -sum(share * np.log(share) for share in shares if share > 0)
        assert summary.perplexity == pytest.approx(np.exp(entropy))
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("items", [96, 100, 101])
def test_balanced_clusters_are_as_even_as_can_be(items: int) -> None:
    quantizer = ResidualKMeans.fit(clustered(items), (8, 8), seed=0, balanced=True)
    for codes in quantizer.training_codes_IH.T:
        sizes = np.bincount(codes, minlength=8)
        assert sizes.min() == items // 8
        assert sizes.max() == -(-items // 8)


def test_far_apart_clusters_are_found() -> None:
    vectors = np.repeat(np.eye(4) * 100, 10, axis=0) + np.random.default_rng(0).normal(size=(40, 4))
    codes = ResidualKMeans.fit(vectors, (4,), seed=0).training_codes_IH[:, 0].reshape(4, 10)
    assert (codes == codes[:, :1]).all()
    assert len(set(codes[:, 0].tolist())) == 4


def test_fewer_items_than_codes_names_the_level() -> None:
    with pytest.raises(InputError, match="fewer items than codes: level 2 has 9 codes, but there are 8 items"):
        ResidualKMeans.fit(clustered(8), (4, 9), seed=0)


@pytest.mark.parametrize("sizes", [(), (4, 0)])
def test_senseless_level_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="level_sizes"):
        ResidualKMeans.fit(clustered(), sizes, seed=0)


@pytest.mark.parametrize("row", [7, BLOCK_ROWS + 5])
def test_values_that_are_not_finite_are_refused(row: int) -> None:
    vectors = clustered(2 * BLOCK_ROWS)
    vectors[row, 2] = np.nan
    with pytest.raises(InputError, match=f"row {row} "):
        ResidualKMeans.fit(vectors, (4,), seed=0)


def test_items_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(InputError, match="all 6 items are the same"):
        ResidualKMeans.fit(np.ones((6, 3)), (3, 2), seed=0)


def test_a_single_item_has_a_code() -> None:
    quantizer = ResidualKMeans.fit(np.ones((1, 3)), (1, 1), seed=0)
    assert quantizer.training_codes_IH.tolist() == [[0, 0]]


def test_fewer_distinct_vectors_than_codes_leave_codes_unused_and_nothing_over() -> None:
    distinct = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    vectors = distinct[np.arange(20) % 3]
    quantizer = ResidualKMeans.fit(vectors, (8, 4), seed=0)
    assert [summary.codes_used for summary in quantizer.summaries] == [3, 1]
    assert quantizer.summaries[0].mean_squared_residual == 0.0
    assert len({tuple(codes) for codes in quantizer.training_codes_IH.tolist()}) == 3
    np.testing.assert_array_equal(quantizer.encode(distinct), quantizer.training_codes_IH[:3])


def test_fewer_distinct_vectors_than_codes_can_be_balanced() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 5))[np.arange(20) % 3]
    quantizer = ResidualKMeans.fit(vectors, (8, 4), seed=0, balanced=True)
    assert sorted(np.bincount(quantizer.training_codes_IH[:, 0]).tolist()) == [2] * 4 + [3] * 4
    assert np.bincount(quantizer.training_codes_IH[:, 1]).tolist() == [5] * 4


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rounds": 0}, "rounds"),
        ({"training_items_per_code": 0}, "training_items_per_code"),
        ({"device": "abacus"}, "device"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"field '{field}'"):
        ResidualKMeans.fit(clustered(), (4,), seed=0, **arguments)


@pytest.mark.parametrize("vectors", [np.ones(6), np.array([["a", "b"]])])
def test_what_is_no_table_of_numbers_is_refused(vectors: np.ndarray) -> None:
    with pytest.raises(InputError, match="field 'vectors'"):
        ResidualKMeans.fit(vectors, (1,), seed=0)


def test_encode_refuses_vectors_of_another_width_or_that_are_not_finite() -> None:
    quantizer = ResidualKMeans.fit(clustered(), (4,), seed=0)
    with pytest.raises(InputError, match="4 dimensions, the codebooks 5"):
        quantizer.encode(clustered()[:, :4])
    with pytest.raises(InputError, match="row 1 holds"):
        quantizer.encode(np.array([[0.0] * 5, [0.0] * 4 + [1e39]]))


def test_the_error_never_rises_from_round_to_round() -> None:
    vectors = np.random.default_rng(4).normal(size=(300, 6)).astype(np.float32)
    errors = [
        ResidualKMeans.fit(vectors, (20,), seed=1, rounds=rounds).summaries[0].mean_squared_residual
        for rounds in range(1, 12)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_a_code_that_loses_its_items_starts_again_where_it_is_of_use() -> None:
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    fitted = fit_plain(rows, torch.tensor([[0.5], [15.0], [-99.0]]), 10)
    assert sorted(fitted[:, 0].tolist()) == [0.5, 10.5, 30.0]


def test_moved_centroids_lower_the_error_where_lloyds_rounds_are_stuck() -> None:
    """20 centroids on an odd row each, the last with all the other rows: Lloyd's rounds change nothing."""
    rows = np.random.default_rng(0).normal(size=(400, 30)).astype(np.float32)
    rows[:20] *= 2.0
    centroids = torch.from_numpy(np.concatenate([rows[:20], rows[20:].mean(axis=0, keepdims=True)]))

    def nearest() -> tuple[torch.Tensor, torch.Tensor]:
        closest = (torch.from_numpy(rows)[:, None] - centroids).square().sum(dim=2).min(dim=1)
        return closest.values, closest.indices

    distances, codes = nearest()
    assert codes.tolist() == [*range(20), *[20] * 380]
    assert move_idle_centroids(torch.from_numpy(rows), codes, distances, centroids) == 1
    assert nearest()[0].sum() < distances.sum() - 100.0
    fitted = fit_plain(torch.from_numpy(rows), centroids, 20)
    sizes = torch.bincount(nearest_codes(torch.from_numpy(rows), fitted), minlength=21)
    assert int(sizes.max()) < 100


def test_a_centroid_stays_where_a_second_one_elsewhere_saves_less() -> None:
    """Noise in 50 dimensions has no direction that saves much, though the cluster's total is large."""
    rows = np.random.default_rng(0).normal(size=(43, 50)).astype(np.float32)
    rows[40:] = 1.5
    centroids = torch.from_numpy(np.stack([rows[:40].mean(axis=0), rows[40]]))
    distances = (torch.from_numpy(rows)[:, None] - centroids).square().sum(dim=2)
    cost_without = float(distances[40:, 0].sum())
    assert cost_without < MOST_SAVED * float(distances[:40, 0].sum())  # so it is looked at
    nearest = distances.min(dim=1)
    assert nearest.indices.tolist() == [0] * 40 + [1] * 3
    assert move_idle_centroids(torch.from_numpy(rows), nearest.indices, nearest.values, centroids) == 0


def test_centroids_that_are_of_use_stay() -> None:
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    centroids = torch.tensor([[0.5], [10.5], [30.0]])
    distances = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])
    assert move_idle_centroids(rows, torch.tensor([0, 0, 1, 1, 2]), distances, centroids) == 0
    assert centroids[:, 0].tolist() == [0.5, 10.5, 30.0]


def test_rounds_agree_with_lloyds_rounds_in_float64() -> None:
    rows = np.random.default_rng(8).normal(size=(200, 3)).astype(np.float32)
    slow = rows[:7].astype(np.float64)
    for _ in range(5):
        codes = ((rows[:, None] - slow) ** 2).sum(axis=2).argmin(axis=1)
        slow = np.stack([rows[codes == code].mean(axis=0, dtype=np.float64) for code in range(7)])
    fitted = fit_plain(torch.from_numpy(rows), torch.from_numpy(rows[:7]), 5)
    np.testing.assert_allclose(fitted.numpy(), slow, rtol=1e-5, atol=1e-6)


def test_the_start_takes_a_row_of_every_far_group() -> None:
    groups = np.repeat(np.eye(9) * 1000, 30, axis=0) + np.random.default_rng(0).normal(size=(270, 9))
    start = starting_centroids(torch.from_numpy(groups.astype(np.float32)), 9, np.random.default_rng(2))
    assert sorted(start.argmax(dim=1).tolist()) == list(range(9))


def test_a_common_shift_of_all_vectors_does_not_blur_the_nearest_centroid() -> None:
    """Distances of about 1, 3,000 from the origin: sums of squares in float32 would not tell them apart."""
    vectors = (clustered(400, 4) + 3000.0).astype(np.float32)
    quantizer = ResidualKMeans.fit(vectors, (6,), seed=0)
    np.testing.assert_array_equal(quantizer.training_codes_IH, encode_one_by_one(quantizer, vectors))


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_codes_do_not_depend_on_the_rows_beside_them_and_ties_go_to_the_first(data: st.DataObject) -> None:
    """Small integers: ties between centroids, and centroids that are the same, are the rule."""
    element = st.integers(-2, 2).map(float)
    centroids = data.draw(hypothesis_numpy.arrays(np.float32, (5, 2), elements=element))
    rows = data.draw(hypothesis_numpy.arrays(np.float32, (12, 2), elements=element))
    expected = ((rows[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    together = nearest_codes(torch.from_numpy(rows), torch.from_numpy(centroids))
    assert together.tolist() == expected.tolist()
    assert [
        int(nearest_codes(row[None], torch.from_numpy(centroids))) for row in torch.from_numpy(rows)
    ] == together.tolist()


@settings(deadline=None, max_examples=15)
@given(st.integers(8, 60), st.integers(0, 99), st.booleans())
def test_fits_are_deterministic_and_agree_with_their_codes(items: int, seed: int, balanced: bool) -> None:
    vectors = clustered(items, 3, seed)
    first, again = (ResidualKMeans.fit(vectors, (8, 3), seed=seed, balanced=balanced, rounds=5) for _ in range(2))
    np.testing.assert_array_equal(first.training_codes_IH, again.training_codes_IH)
    residuals = vectors.astype(np.float64)
    for level, (book, summary) in enumerate(zip(first.codebooks, first.summaries, strict=True)):
        np.testing.assert_array_equal(book, again.codebooks[level])
        residuals = residuals - book[first.training_codes_IH[:, level]]
        assert summary.mean_squared_residual == pytest.approx((residuals**2).sum(axis=1).mean(), rel=1e-4, abs=1e-9)
        sizes = np.bincount(first.training_codes_IH[:, level], minlength=len(book))
        assert not balanced or (sizes.min() == items // len(book) and sizes.max() == -(-items // len(book)))
    if not balanced:
        np.testing.assert_array_equal(first.encode(vectors), first.training_codes_IH)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_device_fits_as_well_as_the_cpu_and_always_the_same_and_gives_the_same_codes(
    device: str, balanced: bool
) -> None:
    vectors = clustered(items=2 * BLOCK_ROWS + 5, dimensions=16)
    sizes = (32, 32, 32)
    on_cpu, on_device, again = (
        ResidualKMeans.fit(vectors, sizes, seed=0, balanced=balanced, device=where) for where in ("cpu", device, device)
    )
    np.testing.assert_array_equal(on_device.training_codes_IH, again.training_codes_IH)
    # Rounding differs between devices, and a row that falls to another code changes what follows.
    errors = [quantizer.summaries[-1].mean_squared_residual for quantizer in (on_device, on_cpu)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    if balanced:
        for level, size in enumerate(sizes):
            counts = np.bincount(on_device.training_codes_IH[:, level], minlength=size)
            assert {len(vectors) // size, -(-len(vectors) // size)} >= set(counts.tolist())
    newcomers = clustered(items=BLOCK_ROWS + 1, dimensions=16, seed=1)
    np.testing.assert_array_equal(on_cpu.encode(newcomers, device=device), on_cpu.encode(newcomers))


def test_another_seed_gives_another_start() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    books = [ResidualKMeans.fit(vectors, (16,), seed=seed, rounds=1).codebooks[0] for seed in (0, 1)]
    assert not np.array_equal(*books)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_memory_map_larger_than_a_block_trained_on_a_part(tmp_path: Path, balanced: bool) -> None:
    items = 2 * BLOCK_ROWS + 77
    vectors = clustered(items, 4)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    part = ResidualKMeans.fit(mapped, (12, 6), seed=0, balanced=balanced, training_items_per_code=50)
    whole = ResidualKMeans.fit(vectors, (12, 6), seed=0, balanced=balanced, training_items_per_code=None)
    assert part.training_codes_IH.shape == (items, 2)
    for level, size in enumerate((12, 6)):
        sizes = np.bincount(part.training_codes_IH[:, level], minlength=size)
        assert not balanced or (sizes.min() == items // size and sizes.max() == -(-items // size))
        errors = [fitted.summaries[level].mean_squared_residual for fitted in (part, whole)]
        assert errors[0] <= 1.15 * errors[1]
    if not balanced:
        np.testing.assert_array_equal(part.encode(mapped), part.training_codes_IH)
    assert not np.array_equal(part.codebooks[0], whole.codebooks[0])


@pytest.mark.parametrize("balanced", [False, True])
def test_another_process_with_other_threads_gives_the_same_codes(balanced: bool) -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from item_index.quantizer import ResidualKMeans\n"
        "vectors = np.random.default_rng(5).normal(size=(200, 8)).astype(np.float32)\n"
        f"fitted = ResidualKMeans.fit(vectors, (8, 6), seed=3, balanced={balanced})\n"
        "print(hashlib.sha256(fitted.training_codes_IH.tobytes() + fitted.codebooks[1].tobytes()).hexdigest())\n"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    other = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    vectors = np.random.default_rng(5).normal(size=(200, 8)).astype(np.float32)
    fitted = ResidualKMeans.fit(vectors, (8, 6), seed=3, balanced=balanced)
    content = fitted.training_codes_IH.tobytes() + fitted.codebooks[1].tobytes()
    assert hashlib.sha256(content).hexdigest() == other
