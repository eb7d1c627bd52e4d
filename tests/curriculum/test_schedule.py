"""Places of the reasoning rows in a pass."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.schedule import reasoning_positions

rows_and_reasoning = st.integers(0, 400).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, rows)))


@settings(deadline=None)
@given(rows_and_reasoning, st.booleans())
def test_places_are_distinct_sorted_and_inside_the_pass(sizes, uniform):
    rows, reasoning = sizes
    places = reasoning_positions(rows, reasoning, uniform=uniform)
    assert places.dtype == np.int64
    assert len(places) == reasoning
    assert (np.diff(places) > 0).all()
    assert reasoning == 0 or (places[0] >= 0 and places[-1] < rows)


@settings(deadline=None)
@given(st.integers(2, 3000), st.floats(0.01, 0.5))
def test_density_grows_linearly_so_the_count_grows_with_the_square(rows, share):
    # At more than one half the last rows would have to be denser than one reasoning row a row.
    reasoning = int(share * rows)
    places = reasoning_positions(rows, reasoning, uniform=False)
    x = np.arange(rows + 1)
    count = np.searchsorted(places, x)
    assert np.abs(count - reasoning * (x / rows) ** 2).max() <= 2


@settings(deadline=None)
@given(rows_and_reasoning)
def test_the_last_pass_is_uniform(sizes):
    rows, reasoning = sizes
    places = reasoning_positions(rows, reasoning, uniform=True)
    x = np.arange(rows + 1)
    expected = reasoning * x / max(rows, 1)
    assert np.abs(np.searchsorted(places, x) - expected).max() <= 1


def test_a_growing_pass_has_no_tail_of_reasoning_rows():
    places = reasoning_positions(1000, 200, uniform=False)
    quarters = np.histogram(places, bins=[0, 250, 500, 750, 1000])[0]
    np.testing.assert_allclose(quarters, [12.5, 37.5, 62.5, 87.5], atol=1)
    assert len(places) - np.searchsorted(places, 990) <= 5  # density 0.4 at the end


def test_small_passes_by_hand():
    assert reasoning_positions(8, 2, uniform=True).tolist() == [2, 6]
    assert reasoning_positions(8, 2, uniform=False).tolist() == [4, 6]  # 8 sqrt(1/4), 8 sqrt(3/4) = 6.9
    assert reasoning_positions(3, 3, uniform=False).tolist() == [0, 1, 2]
    assert reasoning_positions(5, 0, uniform=False).tolist() == []


@pytest.mark.parametrize("reasoning", [-1, 6])
def test_more_reasoning_rows_than_rows_are_an_error(reasoning):
    with pytest.raises(ValueError, match="do not fit"):
        reasoning_positions(5, reasoning, uniform=False)
