from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from scipy.optimize import linear_sum_assignment

from item_index.input_error import InputError
from item_index.quantizer import ResidualKMeans, balanced_assignment


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


def test_values_that_are_not_finite_are_refused() -> None:
    vectors = clustered()
    vectors[7, 2] = np.nan
    with pytest.raises(InputError, match="row 7"):
        ResidualKMeans.fit(vectors, (4,), seed=0)


@pytest.mark.parametrize("balanced", [False, True])
def test_items_that_are_all_the_same(balanced: bool) -> None:
    quantizer = ResidualKMeans.fit(np.ones((6, 3)), (3, 2), seed=0, balanced=balanced)
    assert quantizer.summaries[0].codes_used == (3 if balanced else 1)
    assert quantizer.summaries[1].mean_squared_residual == pytest.approx(0)


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


def cheapest_balanced_cost(costs: np.ndarray) -> float:
    """By the assignment problem: one column per place, and stand-ins that may take only a cluster's last place."""
    items, clusters = costs.shape
    places = -(-items // clusters)
    stand_in = np.where(np.tile(np.arange(places), clusters) == places - 1, 0.0, 1e6)
    square = np.concatenate(
        [np.repeat(costs, places, axis=1), np.tile(stand_in, (clusters * places - items, 1))], axis=0
    )
    return float(square[linear_sum_assignment(square)].sum())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_balanced_assignment_is_the_cheapest(data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, 6))
    items = data.draw(st.integers(clusters, 20))
    costs = data.draw(hypothesis_numpy.arrays(np.float64, (items, clusters), elements=st.floats(-5, 5, width=16)))
    assigned = balanced_assignment(costs)
    sizes = np.bincount(assigned, minlength=clusters)
    assert sizes.min() >= items // clusters
    assert sizes.max() <= -(-items // clusters)
    assert costs[np.arange(items), assigned].sum() == pytest.approx(cheapest_balanced_cost(costs), abs=1e-6)
