"""The collaborative signal of item vectors: who had what, from train interactions only, and its fusion with text."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits


def collaborative_vectors(train_UI: sparse.csr_array, *, dimensions: int, seed: int) -> np.ndarray:
    """Item vectors of co-interaction, float32 [items, d]; items that the same users had lie close together.

    With X = `train_UI`, and D_u and D_i the diagonal matrices of its row and column sums, the normalised co-occurrence
    of items is N'N for N = D_u^(-1/2) X D_i^(-1/2). The truncated SVD N ~ U S V' gives V S, whose rows have those
    co-occurrences as inner products, and the items-by-items matrix is never made. One direction of singular value 1,
    the square root of popularity, is there whatever the users did, so it is left out. Rows are scaled to unit length,
    because a rare item's would be short.

    Args:
        train_UI: [users, items], 1 where the user's train part holds the item. Whoever puts validation or test
            interactions in lets the targets leak into the index.
        dimensions: d; fewer columns come back where there are fewer users or items.
        seed: of the randomised SVD (GREAM section 1.3 leaves the factorisation open).

    An item without train interactions has zeros. Raises ValueError for dimensions below 1.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions must be at least 1, got {dimensions}")
    users, items = train_UI.shape
    width = min(dimensions, users - 1, items - 1)
    if width < 1:
        return np.zeros((items, 1), dtype=np.float32)
    of_user, of_item = (np.asarray(train_UI.sum(axis=axis), dtype=np.float64) for axis in (1, 0))
    normalised = (
        sparse.diags_array(1.0 / np.sqrt(np.maximum(of_user, 1.0)))
        @ train_UI
        @ sparse.diags_array(1.0 / np.sqrt(np.maximum(of_item, 1.0)))
    )
    # One thread: sums in a fixed order give the same vectors on every run.
    with threadpool_limits(limits=1):
        _, singular, components = randomized_svd(normalised.astype(np.float64), width + 1, random_state=seed)
        # Where users fall into groups without an item in common, other directions have singular value 1 as well, and
        # popularity may lie anywhere among them: what is kept is the complement of its coordinates.
        popularity = components @ np.sqrt(of_item / max(of_item.sum(), 1.0))
        complement = np.linalg.svd(popularity[None, :])[2][1:]
        vectors = (components.T * singular) @ complement.T
    # The SVD leaves rounding where a row is zero, and scaling would blow it up.
    vectors[of_item == 0] = 0.0
    return (vectors * _inverse_norms(vectors)[:, None]).astype(np.float32)


def fuse(text_ID: np.ndarray, collaborative_Id: np.ndarray, *, weight: float) -> np.ndarray:
    """[text | collaborative], float32 [items, D + d].

    The text block stays as it is. The collaborative block is scaled so that the mean norm of its rows, rows of zeros
    left out, is `weight` times the text's mean norm: weight 1 gives both blocks the same say in a distance. A newcomer
    without interactions is its text vector and zeros, whatever the weight is.

    Raises ValueError for numbers of rows that differ and a negative weight.
    """
    if len(text_ID) != len(collaborative_Id):
        raise ValueError(f"{len(text_ID)} text vectors and {len(collaborative_Id)} collaborative ones")
    if weight < 0:
        raise ValueError(f"the weight must not be negative, got {weight}")
    text_norm, norm = _mean_norm(text_ID), _mean_norm(collaborative_Id)
    scale = weight * text_norm / norm if norm > 0 else 0.0
    return np.concatenate([text_ID, collaborative_Id * np.float32(scale)], axis=1, dtype=np.float32)


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("id,id->i", vectors, vectors, dtype=np.float64))


def _inverse_norms(vectors: np.ndarray) -> np.ndarray:
    norms = _norms(vectors)
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _mean_norm(vectors: np.ndarray) -> float:
    """Mean over the rows that are not zero; 0 where all are."""
    norms = _norms(vectors)
    return float(norms[norms > 0].mean()) if (norms > 0).any() else 0.0
