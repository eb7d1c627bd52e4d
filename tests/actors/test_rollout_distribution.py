"""Constrained samples of real vLLM against the exactly enumerated distribution over the catalogue."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from actors.reward import RewardWorker
from actors.rollout import prompt_seeds
from learner.rollouts import RolloutPrompts

pytestmark = pytest.mark.engines
SAMPLES, GROUP = 20_000, 500


def exact_distribution(tiny, prompt, excluded, temperature):
    """p(item) by plain transformers: full logits after every prefix, a dict of the continuations that remain."""
    left = [row for row in range(len(tiny.index)) if row not in excluded]
    spelled = {row: [*tiny.builder.item_tokens[row], tiny.constraint.tokens.end_of_sequence] for row in left}
    probabilities = np.zeros(len(tiny.index))
    for row, tokens in spelled.items():
        logits = tiny.model(torch.tensor([[*prompt, *tokens]])).logits[0].double()
        log_p = 0.0
        for place, token in enumerate(tokens):
            options = sorted({other[place] for other in spelled.values() if other[:place] == tokens[:place]})
            at = logits[len(prompt) + place - 1] / temperature
            log_p += float(at[token] - at[options].logsumexp(dim=0))
        probabilities[row] = np.exp(log_p)
    return probabilities


@pytest.mark.parametrize(("excluded", "temperature"), [([], 1.0), ([], 0.7), ([0, 5, 17, 18], 1.0), ([0, 5], 0.7)])
def test_frequencies_agree_with_the_exact_distribution(tiny, rollout_engine, excluded, temperature):
    one = tiny.prompts(["direct"], excluded=[excluded])
    prompts = RolloutPrompts.concatenate([one] * (SAMPLES // GROUP))
    batch = rollout_engine.generate(
        prompts, responses=GROUP, seeds=prompt_seeds(7, 1, len(prompts)), temperature=temperature
    )
    items = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint)).score(batch).items.reshape(-1)
    counts = np.bincount(items, minlength=len(tiny.index))
    with torch.inference_mode():
        expected = exact_distribution(tiny, one.tokens[0].tolist(), excluded, temperature) * SAMPLES
    assert counts.sum() == SAMPLES
    assert abs(expected.sum() - SAMPLES) < 1e-3
    assert counts[excluded].sum() == 0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    kept = wanted > 0
    assert kept.sum() >= 8, "a distribution over a few items would test little"
    assert chisquare(observed[kept], wanted[kept]).pvalue > 0.001
