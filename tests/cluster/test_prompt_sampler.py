import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.prompt_sampler import PromptSampler

counts = st.lists(st.integers(0, 25), min_size=1, max_size=12)


@given(places=st.integers(1, 40), seed=st.integers(0, 5), sizes=counts)
def test_every_pass_visits_every_position_once(places, seed, sizes):
    positions = np.arange(places) * 3 + 7
    sampler = PromptSampler(positions, seed)
    drawn = np.concatenate([sampler.draw(size, "direct") for size in sizes])
    assert len(drawn) == sum(sizes)
    for first in range(0, len(drawn), places):
        part = drawn[first : first + places]
        assert len(set(part.tolist())) == len(part)
        if len(part) == places:
            assert sorted(part) == positions.tolist()


@given(seed=st.integers(0, 5), sizes=counts, other=counts)
def test_draws_of_one_mode_do_not_change_those_of_the_other(seed, sizes, other):
    alone, mixed = PromptSampler(np.arange(9), seed), PromptSampler(np.arange(9), seed)
    expected = [alone.draw(size, "direct").tolist() for size in sizes]
    found = []
    for place, size in enumerate(sizes):
        mixed.draw(other[place % len(other)], "reasoning")
        found.append(mixed.draw(size, "direct").tolist())
    assert found == expected


@given(seed=st.integers(0, 5), before=counts, after=counts, curriculum=st.booleans())
def test_a_restored_sampler_goes_on_with_the_same_draws(seed, before, after, curriculum):
    def go_on(sampler, sizes):
        drawn = []
        for number, size in enumerate(sizes):
            for position in sampler.draw(size, "reasoning").tolist():
                drawn.append(position)
                sampler.record(position, "reasoning", (position + number) % 3 == 0)
        return drawn

    first = PromptSampler(np.arange(20), seed, curriculum=curriculum)
    go_on(first, before)
    second = PromptSampler(np.arange(20), seed + 1, curriculum=curriculum)
    second.restore(first.state())
    assert go_on(first, after) == go_on(second, after)


def test_the_curriculum_asks_less_often_for_what_taught_nothing_but_asks_again():
    places, passes = 400, 60
    sampler = PromptSampler(np.arange(places), 0, curriculum=True)
    misses = np.arange(places) % 5
    for position in range(places):
        for _ in range(misses[position]):
            sampler.record(position, "direct", False)
    counts = np.zeros(places)
    expected_length = np.maximum(1 / 8, 0.5**misses).sum()
    drawn = sampler.draw(int(passes * expected_length), "direct")
    np.add.at(counts, drawn, 1)
    for miss, share in enumerate((1, 1 / 2, 1 / 4, 1 / 8, 1 / 8)):
        assert counts[misses == miss].mean() / passes == pytest.approx(share, abs=0.03)
    assert counts.min() > 0
    for position in range(places):
        sampler.record(position, "direct", True)
    assert (sampler.misses["direct"] == 0).all()


def test_another_seed_gives_another_order_and_no_positions_are_refused():
    orders = {tuple(PromptSampler(np.arange(30), seed).draw(30, "direct").tolist()) for seed in range(4)}
    assert len(orders) == 4
    with pytest.raises(ValueError, match="no places"):
        PromptSampler(np.zeros(0, np.int64), 0)
