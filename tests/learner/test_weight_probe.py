"""Sums over weights: what they notice, and what they do not take for a difference."""

import math

import pytest
import torch

from learner.weight_probe import EngineSum, different_weights, learner_sum

torch.manual_seed(0)
WEIGHTS = {
    "q_proj.weight": 0.02 * torch.randn(256, 256),
    "k_proj.weight": 0.02 * torch.randn(128, 256),
    "norm.weight": torch.ones(256),
    "embed_tokens.weight": 0.02 * torch.randn(3000, 256),
}
FUSED = ("q_proj.weight", "k_proj.weight")


def engine_sums(weights, *, dtype=torch.float32):
    """Of an engine that fuses and packs the projections."""
    packed = torch.cat([weights[name] for name in FUSED]).to(dtype) @ torch.ones(256, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    single = [(one, weights[one].to(dtype)) for one in ("norm.weight", "embed_tokens.weight")]
    return [
        EngineSum(FUSED, float(packed.sum(dtype=torch.float64)), name, True),
        *(EngineSum((one,), float(weight.flip(0).sum(dtype=torch.float64)), name, False) for one, weight in single),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_fused_packed_and_rounded_are_no_difference(dtype):
    learner = {name: learner_sum(weight) for name, weight in WEIGHTS.items()}
    assert different_weights(learner, engine_sums(WEIGHTS, dtype=dtype)) == ([], 4)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("q_proj.weight", list(FUSED)),
        ("norm.weight", ["norm.weight"]),
        ("embed_tokens.weight", ["embed_tokens.weight"]),
    ],
)
def test_one_small_update_of_one_tensor_is_noticed(changed, expected):
    signs = torch.randn(WEIGHTS[changed].shape).sign()
    learner = {name: learner_sum(weight + (1e-6 * signs if name == changed else 0)) for name, weight in WEIGHTS.items()}
    assert different_weights(learner, engine_sums(WEIGHTS)) == (expected, 4)


def test_a_sum_that_is_no_number_is_a_difference_and_an_unknown_parameter_is_not_compared():
    learner = {"norm.weight": learner_sum(WEIGHTS["norm.weight"])}
    sums = [
        EngineSum(("norm.weight",), math.nan, "float32", False), EngineSum(("other.weight",), 1.0, "float32", False),
    ]  # fmt: skip
    assert different_weights(learner, sums) == (["norm.weight"], 1)
