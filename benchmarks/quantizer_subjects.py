"""One program that makes residual codes, on synthetic vectors, in a process of its own.

    python -m benchmarks.quantizer_subjects '{"subject": "ours", "items": 10000, ...}'

`benchmarks.quantizer` starts it and reads the JSON of the last line, so that time and peak memory are one subject's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from item_index.kmeans import starting_centroids
from item_index.quantizer import ResidualKMeans

DIMENSIONS = 384
BLOCK = 16384

Codes = tuple[np.ndarray, list[np.ndarray]]  # int [items, H], and per level float32 [K, D]


@dataclass(frozen=True)
class Task:
    """What one child process does; `items_per_code` bounds the training items of a level, None trains on all."""

    subject: str
    items: int
    levels: int
    codes: int
    rounds: int
    balanced: bool
    items_per_code: int | None
    seed: int = 0


def synthetic_vectors(items: int, seed: int) -> np.ndarray:
    """float32 [items, 384], of unit length: 64 topics, 2,048 subtopics of Zipf's popularity, and noise of each item.

    All three have coordinates that shrink with the square root of their index, as the principal components of text
    embeddings do, so there is structure for several residual levels and clusters of very uneven size.
    """
    generator = np.random.default_rng(seed)
    scale_D = (1.0 + np.arange(DIMENSIONS)) ** -0.5
    topics = generator.normal(size=(64, DIMENSIONS)) * scale_D
    subtopics = topics[generator.integers(64, size=2048)] + 0.7 * generator.normal(size=(2048, DIMENSIONS)) * scale_D
    popularity = (1.0 + np.arange(2048)) ** -0.8
    popularity /= popularity.sum()
    vectors_ID = np.empty((items, DIMENSIONS), dtype=np.float32)
    for start in range(0, items, BLOCK):
        block = vectors_ID[start : start + BLOCK]
        noise = generator.standard_normal(size=block.shape, dtype=np.float32)
        block[:] = subtopics[generator.choice(2048, size=len(block), p=popularity)] + 0.8 * noise * scale_D
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors_ID


def ours(vectors_ID: np.ndarray, task: Task) -> Codes:
    fitted = ResidualKMeans.fit(
        vectors_ID, [task.codes] * task.levels, seed=task.seed, balanced=task.balanced, rounds=task.rounds,
        training_items_per_code=task.items_per_code,
    )  # fmt: skip
    return fitted.training_codes_IH, list(fitted.codebooks)


def faiss_kmeans(vectors_ID: np.ndarray, task: Task) -> Codes:
    """faiss.Kmeans level by level on the residuals; it starts at random items."""
    import faiss

    residuals_ID = vectors_ID.copy()
    columns, codebooks = [], []
    for level in range(task.levels):
        kmeans = faiss.Kmeans(
            DIMENSIONS, task.codes, niter=task.rounds, seed=task.seed + level + 1,
            max_points_per_centroid=task.items_per_code or task.items,
        )  # fmt: skip
        kmeans.train(residuals_ID)
        codes_I = kmeans.index.search(residuals_ID, 1)[1][:, 0]
        for start in range(0, task.items, BLOCK):
            residuals_ID[start : start + BLOCK] -= kmeans.centroids[codes_I[start : start + BLOCK]]
        columns.append(codes_I)
        codebooks.append(kmeans.centroids)
    return np.stack(columns, axis=1), codebooks


def faiss_residual_quantizer(vectors_ID: np.ndarray, task: Task) -> Codes:
    """faiss.ResidualQuantizer with its own settings: a beam of 5 over the levels. Codes are powers of two."""
    import faiss

    bits = task.codes.bit_length() - 1
    quantizer = faiss.ResidualQuantizer(DIMENSIONS, task.levels, bits)
    quantizer.cp.niter = task.rounds
    trained = np.random.default_rng(task.seed).permutation(task.items)[
        : (task.items_per_code or task.items) * task.codes
    ]
    quantizer.train(vectors_ID[np.sort(trained)])
    packed = [quantizer.compute_codes(vectors_ID[start : start + BLOCK]) for start in range(0, task.items, BLOCK)]
    books = faiss.vector_to_array(quantizer.codebooks).reshape(task.levels, task.codes, DIMENSIONS)
    numbers = np.unpackbits(np.concatenate(packed), axis=1, bitorder="little")[:, : task.levels * bits]
    codes_IH = numbers.reshape(task.items, task.levels, bits) @ (1 << np.arange(bits))
    return codes_IH, list(books)


def constrained_kmeans(vectors_ID: np.ndarray, task: Task) -> Codes:
    """KMeansConstrained level by level on the residuals, from our start (at the first level the very one we take)."""
    from k_means_constrained import KMeansConstrained

    residuals_ID = vectors_ID.copy()
    generator = np.random.default_rng(task.seed)
    columns, codebooks = [], []
    for _ in range(task.levels):
        start_KD = starting_centroids(torch.from_numpy(residuals_ID), task.codes, generator)
        kmeans = KMeansConstrained(
            task.codes, size_min=task.items // task.codes, size_max=-(-task.items // task.codes), n_init=1, tol=0.0,
            init=start_KD.double().numpy(), max_iter=task.rounds, random_state=task.seed,
        ).fit(residuals_ID)  # fmt: skip
        codes_I = kmeans.labels_.astype(np.int64)
        sums_KD = np.zeros((task.codes, DIMENSIONS))
        np.add.at(sums_KD, codes_I, residuals_ID)
        codebook = (sums_KD / np.bincount(codes_I)[:, None]).astype(np.float32)
        residuals_ID -= codebook[codes_I]
        columns.append(codes_I)
        codebooks.append(codebook)
    return np.stack(columns, axis=1), codebooks


SUBJECTS: dict[str, Callable[[np.ndarray, Task], Codes]] = {
    "ours": ours,
    "faiss Kmeans": faiss_kmeans,
    "faiss ResidualQuantizer": faiss_residual_quantizer,
    "k-means-constrained": constrained_kmeans,
}


def mean_squared_error(vectors_ID: np.ndarray, codes_IH: np.ndarray, codebooks: list[np.ndarray]) -> float:
    """Mean over items of the squared norm that all levels together leave."""
    total = 0.0
    for start in range(0, len(vectors_ID), BLOCK):
        left = vectors_ID[start : start + BLOCK].astype(np.float64)
        for level, codebook in enumerate(codebooks):
            left -= codebook[codes_IH[start : start + BLOCK, level]]
        total += float((left**2).sum())
    return total / len(vectors_ID)


def colliding_items(codes_IH: np.ndarray) -> int:
    """Items that share all their codes with another item."""
    counts = np.unique(codes_IH, axis=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def peak_memory_gib() -> float:
    """Largest resident memory that this process has had (Linux), its libraries and the vectors included."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**20


def measure(task: Task) -> dict[str, float]:
    """Seconds and processor seconds of fitting and encoding, peak memory until then, error and collisions."""
    vectors_ID = synthetic_vectors(task.items, task.seed)
    started, processor = time.perf_counter(), time.process_time()
    codes_IH, codebooks = SUBJECTS[task.subject](vectors_ID, task)
    return {
        "time": time.perf_counter() - started,
        "processor time": time.process_time() - processor,
        "peak memory": peak_memory_gib(),
        "error": mean_squared_error(vectors_ID, codes_IH, codebooks),
        "colliding items": float(colliding_items(codes_IH)),
    }


def command(task: Task) -> list[str]:
    """The command line that measures the task in a process of its own."""
    return [sys.executable, "-m", "benchmarks.quantizer_subjects", json.dumps(asdict(task))]


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
