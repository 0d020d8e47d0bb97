"""Measurements merge: how rows are split over batches, clients or processes leaves a score alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.metrics import Mean, merge, perplexity

WHOLE = st.integers(-(2**40), 2**40).map(float)  # sums of these are exact, so equality is equality
MEANS = st.builds(Mean, WHOLE, st.integers(0, 2**20).map(float))


@settings(deadline=None)
@given(st.lists(MEANS), st.data())
def test_any_split_merges_to_the_same(means, data):
    cut = data.draw(st.integers(0, len(means)))
    assert merge(means[:cut]) + merge(means[cut:]) == merge(means) == merge(reversed(means))


@settings(deadline=None)
@given(MEANS)
def test_nothing_measured_changes_nothing(mean):
    assert mean + Mean() == mean == merge([mean])


@settings(deadline=None)
@given(st.lists(st.tuples(WHOLE, st.integers(1, 1000)), min_size=1))
def test_the_value_is_the_mean_over_what_was_counted(parts):
    total = merge(Mean(value, count) for value, count in parts)
    assert total.value == pytest.approx(sum(v for v, _ in parts) / sum(c for _, c in parts))


def test_three_rows_do_not_weigh_as_much_as_three_thousand():
    assert (Mean(3 * 9.0, 3) + Mean(3000 * 1.0, 3000)).value == pytest.approx(1.008, abs=1e-3)


def test_nothing_counted_is_not_a_number_and_perplexity_overflows_to_infinity():
    assert math.isnan(Mean().value)
    assert perplexity(Mean(2 * math.log(7), 2)) == pytest.approx(7)
    assert perplexity(Mean(1e6, 1)) == math.inf
    assert math.isnan(perplexity(Mean()))
