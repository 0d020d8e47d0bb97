"""Means and intervals of few runs."""

import math

import pytest

from sheepfold.report.intervals import T_975, difference, interval, t_975


def test_an_interval_is_the_one_that_students_own_data_have():
    """Student 1908, extra sleep under two drugs: the differences' mean is 1.58, its 95 % interval 0.7001 to 2.4599."""
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = interval(gains)
    assert found.mean == pytest.approx(1.58)
    assert found.mean - found.reach == pytest.approx(0.7001142, abs=1e-4)
    assert found.mean + found.reach == pytest.approx(2.4598858, abs=1e-4)


def test_quantiles_are_scipys_for_few_and_for_many():
    stats = pytest.importorskip("scipy.stats")
    for degrees in [*range(1, 31), 31, 40, 100, 5000]:
        assert t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-4)


def test_a_fraction_of_a_degree_is_rounded_down():
    assert t_975(3.9) == T_975[2]
    with pytest.raises(ValueError, match="at least 1 degree"):
        t_975(0.5)


def test_one_value_has_no_interval():
    assert interval([3.0]).reach is None
    assert not interval([3.0]).excludes_zero


def test_the_same_seeds_are_compared_within_pairs():
    found = difference({0: 1.0, 1: 3.0, 2: 5.0}, {0: 0.9, 1: 2.9, 2: 4.9})
    assert found.paired
    assert found.mean == pytest.approx(0.1)
    assert found.reach == pytest.approx(0.0, abs=1e-9)


def test_other_seeds_are_compared_as_welch_does():
    """scipy's ttest_ind(equal_var=False) of these two has the degrees of freedom 3.8 and the standard error 0.9129."""
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, {5: 2.0, 6: 4.0, 7: 3.0}
    found = difference(ours, theirs)
    error = math.sqrt(5 / 3 / 4 + 1.0 / 3)
    assert not found.paired
    assert found.mean == pytest.approx(-0.5)
    assert found.reach == pytest.approx(T_975[3] * error)  # 4.96 degrees, rounded down to 4


def test_one_run_on_a_side_gives_a_difference_without_an_interval():
    assert difference({0: 1.0}, {1: 2.0, 2: 3.0}).reach is None
