"""Sampling by one random value a row: exact probabilities by integrating over it, and the values themselves."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from actors.inverse_sampling import BLOCK, sample_by_inversion, seeded_uniform


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 3 * BLOCK + 17])
def test_the_share_of_random_values_that_give_a_token_is_its_probability(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(vocabulary, generator=generator)
    logits[torch.randperm(vocabulary, generator=generator)[: vocabulary // 3]] = -torch.inf
    points = 200_001
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    exact = logits.double().softmax(0)
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for part in uniform.split(2_000):
        tokens, log_probabilities = sample_by_inversion(logits.expand(len(part), -1).clone(), part)
        counts += torch.bincount(tokens, minlength=vocabulary)
        assert torch.allclose(log_probabilities.double(), exact[tokens].log(), atol=1e-5)
    # A token's share differs from its probability by less than the two points at its ends.
    assert float((counts / points - exact).abs().max()) < 2 / points + 1e-6
    assert counts[exact == 0].sum() == 0


def test_no_random_value_gives_a_forbidden_token():
    logits = torch.full((3, 2 * BLOCK), -torch.inf)
    logits[0, 7] = logits[1, BLOCK + 3] = logits[2, 0] = logits[2, 5] = 0.0
    for value in (0.0, 0.5, 1 - 2**-53):
        tokens, log_probabilities = sample_by_inversion(logits.clone(), torch.full((3,), value, dtype=torch.float64))
        assert tokens.tolist() == [7, BLOCK + 3, 5 if value >= 0.5 else 0]
        assert log_probabilities.tolist() == pytest.approx([0.0, 0.0, np.log(0.5)])


def test_random_values_are_uniform_and_those_of_neighbouring_seeds_and_places_independent():
    seeds, places = np.meshgrid(np.arange(1_000, dtype=np.uint64) + 2**60, np.arange(50), indexing="ij")
    values = seeded_uniform(seeds, places)
    assert values.min() >= 0
    assert values.max() < 1
    assert kstest(values.ravel(), "uniform").pvalue > 1e-3
    for first, second in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        cells = np.histogram2d(first.ravel(), second.ravel(), bins=8, range=[[0, 1], [0, 1]])[0]
        assert chisquare(cells.ravel()).pvalue > 1e-3
    assert np.array_equal(values, seeded_uniform(seeds, places)), "a function of seed and place alone"
    assert len(np.unique(values)) == values.size
