"""Sampling tokens by inverting the cumulative distribution, with one seeded random value a token.

The sampler of an engine would draw noise for every token of the vocabulary. One value a row is enough, and it can be a
function of the request's seed and the token's place alone: no state to keep, to copy or to roll back.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 512
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the input changes each bit of the output half of the time."""
    values = (values ^ (values >> np.uint64(30))) * _FACTORS[0]
    values = (values ^ (values >> np.uint64(27))) * _FACTORS[1]
    return values ^ (values >> np.uint64(31))


def seeded_uniform(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), of the shape of `seeds`: a function of seed (uint64) and counter (any integers, not below 0).

    SplitMix64 (Steele, Lea and Flood 2014) started at the mixed seed, so that neighbouring seeds, which the responses
    of one group have, start far apart.
    """
    with np.errstate(over="ignore"):
        state = _mixed(seeds + _GOLDEN) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        return (_mixed(state) >> np.uint64(11)) * 2.0**-53


def sample_by_inversion(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token a row in proportion to the softmax; `logits_BV` is overwritten.

    Args:
        logits_BV: float32 [B, V], minus infinity where a token is forbidden; each row has one that is not.
        uniform_B: float64 [B] in [0, 1).

    Returns the tokens, int64 [B], and their log-probabilities, float32 [B].
    """
    batch, vocabulary = logits_BV.shape
    largest = logits_BV.amax(dim=1, keepdim=True)
    shifted = logits_BV.sub_(largest)
    weights = torch.nn.functional.pad(shifted.exp(), (0, -vocabulary % BLOCK)).view(batch, -1, BLOCK)
    rows = torch.arange(batch, device=logits_BV.device)
    # Sums of blocks first: a running sum in double precision over a whole vocabulary would be most of the work.
    by_block = weights.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    total = by_block[:, -1]
    wanted = uniform_B.to(logits_BV.device) * total
    block = _place(by_block, wanted)
    before = torch.where(block > 0, by_block[rows, (block - 1).clamp(min=0)], 0.0)
    inside = weights[rows, block].double().cumsum(dim=1)
    tokens = block * BLOCK + _place(inside, wanted - before)
    return tokens, (shifted[rows, tokens].double() - total.log()).float()


def _place(running_BN: torch.Tensor, wanted_B: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the first place whose running sum exceeds what is wanted. Where rounding leaves none, it is the last
    place that adds anything, never one of probability 0."""
    place = torch.searchsorted(running_BN, wanted_B[:, None], right=True)[:, 0]
    last_that_adds = (running_BN < running_BN[:, -1:]).sum(dim=1)
    return torch.minimum(place, last_that_adds)
