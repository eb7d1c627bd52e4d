"""Weights on their way from the learner to the rollout engines: chunks of whole tensors, never one call a tensor and
never all of them in one piece of memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class WeightChunk:
    """Some of the weights of one version.

    Attributes:
        version: of the weights.
        number: of the chunk, from 0.
        last: whether it is the last one.
        names: of the tensors, as in a checkpoint.
        dtypes: of the tensors, as torch spells them ("bfloat16").
        arrays: the tensors' bytes in their shapes, in a data type of the same width (NumPy has no bfloat16). The object
            store takes them as they are and hands them over without a copy.
    """

    version: int
    number: int
    last: bool
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights by name; they share the chunk's memory, which may be read-only."""
        for name, dtype, array in zip(self.names, self.dtypes, self.arrays, strict=True):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = torch.from_numpy(array)
            yield name, tensor.view(getattr(torch, dtype))


def weight_chunks(
    buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int, *, tied_head: bool
) -> Iterator[WeightChunk]:
    """Chunks of buckets of named weights on the CPU; `tied_head` leaves the output head out."""
    pending: list[tuple[str, torch.Tensor]] | None = None
    number = 0
    for bucket in buckets:
        if pending is not None:
            yield _chunk(pending, version, number, last=False)
            number += 1
        pending = [pair for pair in bucket if not (tied_head and pair[0] == "lm_head.weight")]
    yield _chunk(pending or [], version, number, last=True)


def _chunk(named: list[tuple[str, torch.Tensor]], version: int, number: int, *, last: bool) -> WeightChunk:
    arrays = tuple(
        (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
        for _, tensor in named
    )
    return WeightChunk(
        version, number, last, tuple(name for name, _ in named),
        tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in named), arrays,
    )  # fmt: skip


def tensors_of(chunks: Iterable[WeightChunk]) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of one version, chunk after chunk. Raises ValueError where a chunk is missing or of another version,
    after the tensors before it were given out."""
    version, expected, ended = None, 0, False
    for chunk in chunks:
        if chunk.number != expected or ended or version not in (None, chunk.version):
            raise ValueError(
                f"weights of version {version}: chunk {expected} was to come, and chunk {chunk.number} of version "
                f"{chunk.version} came"
            )
        version, expected, ended = chunk.version, expected + 1, chunk.last
        yield from chunk.tensors()
    if not ended:
        raise ValueError(f"weights of version {version} end after {expected} chunks, before their last one")
