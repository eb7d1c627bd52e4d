"""Places of the reasoning rows in a pass."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curriculum.schedule import reasoning_positions

rows_and_reasoning = st.integers(0, 400).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, rows)))


@given(rows_and_reasoning, st.booleans())
def test_places_are_distinct_sorted_and_inside_the_pass(sizes, uniform):
    rows, reasoning = sizes
    places = reasoning_positions(rows, reasoning, uniform=uniform)
    assert places.dtype == np.int64
    assert len(places) == reasoning
    assert (np.diff(places) > 0).all()
    assert reasoning == 0 or (places[0] >= 0 and places[-1] < rows)


def growing_line(rows, reasoning, x):
    """Reasoning rows before place x when their density grows linearly until it is 1, by numbers alone: the slope is
    found by bisection and the density summed up, without the formulas of the code."""

    def line(slope, places):
        full = 1 / slope  # where the density reaches 1
        return np.where(places <= full, slope * places**2 / 2, places - full / 2)

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if line(middle, float(rows)) < reasoning else (low, middle)
    return line(high, x.astype(float))


@given(rows_and_reasoning)
@example((0, 0))
@example((400, 0))
@example((400, 400))
@example((400, 200))
@example((400, 201))
@example((400, 399))
@example((1, 1))
def test_a_growing_pass_follows_the_line_at_every_place_for_any_share(sizes):
    rows, reasoning = sizes
    places = reasoning_positions(rows, reasoning, uniform=False)
    x = np.arange(rows + 1)
    count = np.searchsorted(places, x)
    expected = growing_line(rows, reasoning, x) if reasoning else np.zeros(rows + 1)
    assert np.abs(count - expected).max() <= 0.5 + 1e-6
    assert count[-1] == reasoning


@given(rows_and_reasoning)
def test_up_to_one_half_the_line_is_the_square_and_beyond_it_ends_in_reasoning_rows_alone(sizes):
    rows, reasoning = sizes
    places = reasoning_positions(rows, reasoning, uniform=False)
    x = np.arange(rows + 1)
    others = rows - reasoning
    if reasoning <= others:
        expected = reasoning * (x / max(rows, 1)) ** 2
        assert np.abs(np.searchsorted(places, x) - expected).max() <= 0.5 + 1e-9
    else:
        assert np.isin(np.arange(2 * others, rows), places).all()
        assert (np.searchsorted(places, x[: 2 * others]) <= x[: 2 * others] / 2 + 0.5).all()  # not before


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.37, 0.5, 0.63, 0.9, 0.999, 1.0])
def test_the_count_in_each_of_ten_bins(share, uniform):
    rows = 20_011
    reasoning = round(share * rows)
    places = reasoning_positions(rows, reasoning, uniform=uniform)
    edges = np.linspace(0, rows, 11).astype(np.int64)
    line = reasoning * edges / rows if uniform or not reasoning else growing_line(rows, reasoning, edges)
    cumulative = np.searchsorted(places, edges)
    assert np.abs(cumulative - line).max() <= 1
    assert np.abs(np.diff(cumulative) - np.diff(line)).max() <= 1 + 1e-6


@given(rows_and_reasoning)
def test_the_last_pass_is_uniform(sizes):
    rows, reasoning = sizes
    places = reasoning_positions(rows, reasoning, uniform=True)
    x = np.arange(rows + 1)
    expected = reasoning * x / max(rows, 1)
    assert np.abs(np.searchsorted(places, x) - expected).max() <= 0.5 + 1e-9


def test_a_pass_of_many_rows_keeps_places_apart():
    # 2 k N^2 is beyond 64 bits here, and neighbours at the end are less than two places apart.
    places = reasoning_positions(300_001, 150_000, uniform=False)
    assert (np.diff(places) > 0).all()
    assert places[-1] < 300_001


def test_a_growing_pass_has_no_tail_of_reasoning_rows():
    places = reasoning_positions(1000, 200, uniform=False)
    quarters = np.histogram(places, bins=[0, 250, 500, 750, 1000])[0]
    np.testing.assert_allclose(quarters, [12.5, 37.5, 62.5, 87.5], atol=1)
    assert len(places) - np.searchsorted(places, 990) <= 5  # density 0.4 at the end


def test_small_passes_by_hand():
    assert reasoning_positions(8, 2, uniform=True).tolist() == [2, 6]
    assert reasoning_positions(8, 2, uniform=False).tolist() == [4, 6]  # 8 sqrt(1/4), 8 sqrt(3/4) = 6.9
    assert reasoning_positions(3, 3, uniform=False).tolist() == [0, 1, 2]
    # Density x / 8 up to place 8, then 1: sqrt(16 (k + 1/2)) for the first four, every place from 8 on.
    assert reasoning_positions(10, 6, uniform=False).tolist() == [2, 4, 6, 7, 8, 9]
    assert reasoning_positions(5, 0, uniform=False).tolist() == []


@pytest.mark.parametrize("reasoning", [-1, 6])
def test_more_reasoning_rows_than_rows_are_an_error(reasoning):
    with pytest.raises(ValueError, match="do not fit"):
        reasoning_positions(5, reasoning, uniform=False)
