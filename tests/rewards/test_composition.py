from dataclasses import replace

import pytest

from item_index.input_error import InputError
from rewards.composition import RewardSample, RewardTerm, load_reward_term, residual_sensitive
from rewards.residual import residual_sensitive_reward

SAMPLE = RewardSample(
    mode="direct", tokens=(5, 6, 7, 8, 2), history=(3, 4), true_item=9, answered_item=6, true_codes=(1, 2, 3, 4),
    answered_codes=(1, 2, 0, 4), levels=4, well_formed=True, forced=False,
    decode=lambda tokens: " ".join(str(token) for token in tokens),
)  # fmt: skip


def test_the_built_in_reward_is_the_residual_sensitive_one():
    term = load_reward_term("residual_sensitive")
    assert term.built_in
    assert term.name == "residual_sensitive"
    assert term.value(SAMPLE) == residual_sensitive_reward((1, 2, 0, 4), (1, 2, 3, 4))
    assert residual_sensitive(replace(SAMPLE, answered_codes=None)) == 0
    assert residual_sensitive(replace(SAMPLE, well_formed=False)) == 0


def test_exact_match_pays_hits_alone():
    term = load_reward_term("exact_match")
    assert term.built_in
    assert term.value(SAMPLE) == 0
    assert term.value(replace(SAMPLE, answered_item=9)) == 1
    assert term.value(replace(SAMPLE, answered_item=9, well_formed=False)) == 0


def test_functions_and_classes_are_found_by_their_path():
    function = load_reward_term("reward_functions:length_penalty", weight=2.0)
    assert (function.name, function.weight, function.built_in) == ("length_penalty", 2.0, False)
    assert function.value(SAMPLE) == pytest.approx(-0.05)
    novelty = load_reward_term("reward_functions:Novelty", name="new to the user")
    assert novelty.name == "new to the user"
    assert [novelty.value(replace(SAMPLE, answered_item=item)) for item in ("item-2", "item-6")] == [0.0, 1.0]
    assert novelty.modes == ("direct", "reasoning")
    assert load_reward_term("reward_functions:Novelty", modes=["direct"]).modes == ("direct",)


def test_what_a_sample_tells():
    assert SAMPLE.text == "5 6 7 8 2"
    assert not SAMPLE.hit
    assert replace(SAMPLE, answered_item=9).hit
    assert not replace(SAMPLE, answered_item=9, well_formed=False).hit


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_reward", "'my_reward' is neither residual_sensitive nor exact_match nor collaborative nor an import path"),
        (":name", "neither"),
        ("no_such_module_here:name", "'no_such_module_here:name' cannot be imported: No module named"),
        ("reward_functions:missing", "has no 'missing'"),
        ("reward_functions:not_callable", "cannot be called"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(InputError, match=message) as error:
        load_reward_term(path)
    assert "package.module:name" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5", [1.0]])
def test_what_is_not_a_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="not a finite number"):
        RewardTerm("mine", 1.0, lambda sample: value).value(SAMPLE)
    assert RewardTerm("mine", 1.0, lambda sample: True).value(SAMPLE) == 1.0
