from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.objective import DIRECT, REASONING, ObjectiveSettings, token_losses, token_weights

NO_KL = ObjectiveSettings(kl_coefficient=0.0)


def literal_loss(
    current: float, old: float, sampler: float, reference: float, advantage: float, settings: ObjectiveSettings
) -> float:
    ratio = math.exp(current - old)
    bounded = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
    policy = max(-advantage * ratio, -advantage * bounded)
    if advantage < 0:
        policy = min(policy, -advantage * settings.dual_clip)
    weight = min(math.exp(old - sampler), settings.importance_cap)
    k3 = math.exp(reference - current) - (reference - current) - 1
    return weight * policy + settings.kl_coefficient * k3


def single(
    ratio: float, advantage: float, *, importance: float = 1.0, settings: ObjectiveSettings = NO_KL
) -> tuple[float, float, dict[str, float]]:
    """Loss, gradient by the current log-probability, and diagnostics of one token; the reference equals old."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    current = (old + math.log(ratio)).requires_grad_()
    losses, diagnostics = token_losses(
        current, old, old - math.log(importance), old, torch.tensor([advantage], dtype=torch.float64), settings
    )
    losses.sum().backward()
    assert current.grad is not None
    return losses.item(), current.grad.item(), {name: value.item() for name, value in diagnostics.items()}


def random_tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    current = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    old, sampler, reference = (
        current + 0.5 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return current, old, sampler, reference, torch.randn(count, generator=generator, dtype=torch.float64)


log_probability = st.floats(-6.0, 0.0)


@given(
    st.lists(
        st.tuples(log_probability, log_probability, log_probability, log_probability, st.floats(-5, 5)),
        min_size=1,
        max_size=20,
    ),
    st.floats(0.0, 0.9),
    st.floats(0.0, 1.0),
    st.floats(2.1, 20.0),
    st.floats(0.1, 4.0),
    st.floats(0.0, 1.0),
)
def test_agrees_with_the_formula(
    rows: list[tuple[float, float, float, float, float]],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    importance_cap: float,
    kl_coefficient: float,
) -> None:
    settings = ObjectiveSettings(clip_low, clip_high, dual_clip, kl_coefficient, importance_cap)
    current, old, sampler, reference, advantages = torch.tensor(rows, dtype=torch.float64).unbind(1)
    losses, _ = token_losses(current, old, sampler, reference, advantages, settings)
    expected = torch.tensor([literal_loss(*row, settings) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 1.0, -1.2, 0.0),  # clipped above: no more credit
        (0.5, 1.0, -0.5, -0.5),  # a good token that fell is still pushed up
        (0.5, -1.0, 0.8, 0.0),  # clipped below: no more blame
        (1.5, -1.0, 1.5, 1.5),  # a bad token that rose is still pushed down
        (9.0, -1.0, 9.0, 9.0),
        (12.0, -1.0, 10.0, 0.0),  # dual clip
        (12.0, 1.0, -1.2, 0.0),
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    value, slope, _ = single(ratio, advantage)
    assert value == pytest.approx(loss)
    assert slope == pytest.approx(gradient, abs=1e-12)


def test_diagnostics_by_hand() -> None:
    clipped = single(1.5, 1.0, importance=3.0)[2]
    assert clipped == pytest.approx(
        {
            "ratio": 1.5,
            "importance": 2.0,
            "importance_truncated": 1.0,
            "clipped": 1.0,
            "dual_clipped": 0.0,
            "kl": 1 / 1.5 + math.log(1.5) - 1,
        }
    )
    dual_clipped = single(12.0, -1.0, importance=0.5)[2]
    assert (dual_clipped["dual_clipped"], dual_clipped["clipped"]) == (1.0, 0.0)
    assert dual_clipped["importance"] == pytest.approx(0.5)
    assert dual_clipped["importance_truncated"] == 0.0


@pytest.mark.parametrize(("importance", "weight"), [(0.5, 0.5), (1.0, 1.0), (1.9, 1.9), (5.0, 2.0)])
def test_importance_weights_the_policy_term_only(importance: float, weight: float) -> None:
    settings = ObjectiveSettings(kl_coefficient=0.1)
    k3 = 1 / 1.1 + math.log(1.1) - 1
    loss, gradient, _ = single(1.1, 1.0, importance=importance, settings=settings)
    assert loss == pytest.approx(-weight * 1.1 + 0.1 * k3)
    assert gradient == pytest.approx(-weight * 1.1 + 0.1 * (1 - 1 / 1.1))


def test_only_the_current_log_probabilities_get_a_gradient() -> None:
    columns = [column.clone().requires_grad_() for column in random_tokens(50, seed=1)]
    losses, diagnostics = token_losses(columns[0], columns[1], columns[2], columns[3], columns[4], ObjectiveSettings())
    losses.sum().backward()
    assert columns[0].grad is not None
    assert columns[0].grad.abs().sum() > 0
    assert all(column.grad is None for column in columns[1:])
    assert not any(value.requires_grad for value in diagnostics.values())


def test_on_policy_with_the_current_values_as_old() -> None:
    current = torch.tensor([-0.3, -2.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5])
    losses, diagnostics = token_losses(current, current, current, current, advantages, ObjectiveSettings())
    losses.sum().backward()
    assert torch.equal(diagnostics["ratio"], torch.ones(2))
    assert torch.equal(diagnostics["kl"], torch.zeros(2))
    torch.testing.assert_close(current.grad, -advantages)


def test_penalty_is_never_negative_and_pulls_to_the_reference() -> None:
    current = torch.tensor([-0.1, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    losses, diagnostics = token_losses(
        current, current, current, reference, torch.zeros(2), ObjectiveSettings(kl_coefficient=1.0)
    )
    losses.sum().backward()
    assert (diagnostics["kl"] > 0).all()
    assert current.grad is not None
    assert current.grad[0] > 0 > current.grad[1]


@pytest.mark.parametrize("distance", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_far_apart_policies_give_finite_gradients(distance: float, advantage: float) -> None:
    old = torch.tensor([-250.0])
    current = (old + distance).requires_grad_()
    losses, _ = token_losses(current, old, old, current, torch.tensor([advantage]), NO_KL)
    losses.sum().backward()
    assert current.grad is not None
    assert torch.isfinite(losses).all()
    assert torch.isfinite(current.grad).all()


def test_half_precision_is_computed_in_float32() -> None:
    columns = [column.to(torch.bfloat16) for column in random_tokens(20, seed=2)]
    losses, diagnostics = token_losses(columns[0], columns[1], columns[2], columns[3], columns[4], ObjectiveSettings())
    assert {losses.dtype, *(value.dtype for value in diagnostics.values())} == {torch.float32}
    wide = [column.float() for column in columns]
    assert torch.equal(losses, token_losses(wide[0], wide[1], wide[2], wide[3], wide[4], ObjectiveSettings())[0])


def test_shapes_must_agree() -> None:
    three, four = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="reference_T has shape"):
        token_losses(three, three, three, four, three, NO_KL)
    with pytest.raises(ValueError, match="advantages_T has shape"):
        token_losses(three, three, three, three, four, NO_KL)


@pytest.mark.parametrize(
    "constants",
    [
        {"clip_low": 1.0},
        {"clip_high": -0.1},
        {"dual_clip": 1.1},
        {"kl_coefficient": -1.0},
        {"importance_cap": 0.0},
        {"token_mean": "per_prompt"},
    ],
)
def test_impossible_settings_are_refused(constants: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(constants))):
        ObjectiveSettings(**constants)  # type: ignore[arg-type]


def test_weights_by_hand() -> None:
    mode = torch.tensor([DIRECT] * 4 + [REASONING] * 6)
    counted = torch.tensor([True, True, False, False] + [True] * 5 + [False])
    per_mode = token_weights(mode, counted, [1, 3])
    torch.testing.assert_close(per_mode, torch.tensor([0.125] * 2 + [0.0] * 2 + [0.15] * 5 + [0.0]))
    plain = token_weights(mode, counted, [1, 3], "global")
    torch.testing.assert_close(plain, torch.tensor([1 / 7] * 2 + [0.0] * 2 + [1 / 7] * 5 + [0.0]))


def test_answers_of_reasoning_count_as_much_as_their_chains() -> None:
    mode = torch.tensor([DIRECT] * 2 + [REASONING] * 7)
    answer = torch.tensor([True] * 2 + [False] * 4 + [True] * 3)  # what it says of direct mode plays no part
    counted = torch.tensor([True] * 8 + [False])
    weights = token_weights(mode, counted, [1, 3], "per_part", answer_T=answer)
    torch.testing.assert_close(weights, torch.tensor([1 / 8] * 2 + [3 / 8 / 4] * 4 + [3 / 8 / 2] * 2 + [0.0]))
    direct_alone = token_weights(mode[:2], counted[:2], [1, 0], "per_part", answer_T=answer[:2])
    torch.testing.assert_close(direct_alone, torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="needs answer_T"):
        token_weights(mode, counted, [1, 3], "per_part")


def test_means_of_other_methods_by_hand() -> None:
    mode = torch.tensor([DIRECT] * 2 + [REASONING] * 5)
    counted = torch.tensor([True, True, True, True, True, False, False])
    response = torch.tensor([0, 0, 1, 1, 1, 1, 2])  # the last one has no counted token
    per_response = token_weights(mode, counted, [1, 1], "per_response", response_T=response)
    torch.testing.assert_close(per_response, torch.tensor([1 / 4] * 2 + [1 / 6] * 3 + [0.0] * 2))
    constant = token_weights(mode, counted, [1, 1], "constant", response_T=response, longest=8)
    torch.testing.assert_close(constant, torch.tensor([1 / 24] * 5 + [0.0] * 2))
    for token_mean, more in (("per_response", {}), ("constant", {"response_T": response})):
        with pytest.raises(ValueError, match="needs"):
            token_weights(mode, counted, [1, 1], token_mean, **more)  # type: ignore[arg-type]


def test_one_token_sets_leave_the_denominator() -> None:
    mode = torch.tensor([DIRECT, DIRECT, REASONING])
    counted = torch.tensor([True, True, True])
    longer_mode = torch.cat([mode, torch.tensor([DIRECT, REASONING, REASONING])])
    longer_counted = torch.cat([counted, torch.tensor([False, False, False])])
    for token_mean in ("per_mode", "global"):
        weights = token_weights(mode, counted, [0.5, 0.5], token_mean)  # type: ignore[arg-type]
        longer = token_weights(longer_mode, longer_counted, [0.5, 0.5], token_mean)  # type: ignore[arg-type]
        assert torch.equal(longer, torch.cat([weights, torch.zeros(3)]))


def test_mode_without_counted_tokens_gets_nothing() -> None:
    mode = torch.tensor([DIRECT, DIRECT, REASONING])
    weights = token_weights(mode, torch.tensor([True, True, False]), [0.25, 0.75])
    assert torch.equal(weights, torch.tensor([0.5, 0.5, 0.0]))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=60).filter(
        lambda rows: any(counted for _, counted in rows)
    ),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
def test_weights_are_means_within_modes(rows: list[tuple[int, bool]], prompts: tuple[int, int]) -> None:
    mode = torch.tensor([row[0] for row in rows])
    counted = torch.tensor([row[1] for row in rows])
    tokens = [sum(1 for row in rows if row == (m, True)) for m in (0, 1)]
    total = sum(share for share, count in zip(prompts, tokens, strict=True) if count)
    expected = [prompts[m] / total / tokens[m] if c else 0.0 for m, c in rows]
    weights = token_weights(mode, counted, prompts)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert float(weights.double().sum()) == pytest.approx(1.0, abs=1e-5)
    plain = token_weights(mode, counted, prompts, "global")
    torch.testing.assert_close(plain, torch.tensor([1 / sum(tokens) if c else 0.0 for _, c in rows]))


@pytest.mark.parametrize("token_mean", ["per_mode", "global"])
@pytest.mark.parametrize("bounds", [[0, 30], [0, 1, 17, 30], list(range(31))])
def test_micro_batches_add_up_to_the_mini_batch(token_mean: str, bounds: list[int]) -> None:
    current, *others = random_tokens(30, seed=3)
    mode = (torch.arange(30) >= 8).long()
    counted = torch.arange(30) % 4 != 0
    weights = token_weights(mode, counted, [3, 5], token_mean)  # type: ignore[arg-type]

    def accumulate(parts: list[tuple[int, int]]) -> tuple[float, Tensor]:
        policy = current.clone().requires_grad_()
        total = 0.0
        for start, stop in parts:
            columns = [other[start:stop] for other in others]
            losses, _ = token_losses(
                policy[start:stop], columns[0], columns[1], columns[2], columns[3], ObjectiveSettings()
            )
            loss = (weights[start:stop] * losses).sum()
            loss.backward()
            total += loss.item()
        assert policy.grad is not None
        return total, policy.grad

    whole_loss, whole_gradient = accumulate([(0, 30)])
    parts_loss, parts_gradient = accumulate(list(pairwise(bounds)))
    assert parts_loss == pytest.approx(whole_loss, abs=1e-12)
    torch.testing.assert_close(parts_gradient, whole_gradient)
    assert (whole_gradient[~counted] == 0).all()


@pytest.mark.parametrize(
    ("mode", "counted", "share", "message"),
    [
        ([0, 1], [False, False], [0.5, 0.5], "no token of the mini-batch counts"),
        ([0, 2], [True, True], [0.5, 0.5], "direct"),
        ([0, 1], [True, True], [1.0, 0.0], "positive share"),
        ([0, 1], [True, True], [1.0], "2 entries"),
        ([0, 1], [True], [0.5, 0.5], "counted_T must be bool"),
    ],
)
def test_impossible_weights_are_refused(mode: list[int], counted: list[bool], share: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_weights(torch.tensor(mode), torch.tensor(counted), share)


def test_unknown_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="per_prompt"):
        token_weights(torch.tensor([0]), torch.tensor([True]), [1, 1], "per_prompt")  # type: ignore[arg-type]
