"""pass@k is the mean over all ways to draw k of the n answers."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.errors import ConfigError
from sheepfold.evaluation.code.pass_at_k import pass_at_k, pass_at_ks


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_it_is_the_share_of_draws_that_hold_a_passed_answer(passed, data):
    k = data.draw(st.integers(1, len(passed)))
    draws = [any(draw) for draw in combinations(passed, k)]
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


@given(st.integers(1, 200), st.data())
def test_more_draws_never_hurt_and_pass_at_1_is_the_share_passed(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert pass_at_k(n, c, 1) <= pass_at_k(n, c, k) + 1e-12 <= 1 + 1e-12


def test_a_k_beyond_the_answers_is_refused_and_left_out_of_a_list():
    with pytest.raises(ConfigError, match=r"pass@5 of 3 answers.*k must be 1 to 3"):
        pass_at_k(3, 1, 5)
    assert pass_at_ks(3, 1, [1, 2, 5]) == {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)}
    assert pass_at_ks(1, 1, [5, 10]) == {"pass@1": 1.0}
