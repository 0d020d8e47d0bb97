"""How work is cut: nothing twice, nothing left out, in order, and nobody with more than need be."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.devices import shares

COSTS = st.lists(st.just(0.0) | st.floats(1e-3, 1e6), max_size=9)
"""Tokens, or rows: some of nothing, and none so small that its half is nothing"""


def largest(costs, parts) -> float:
    return max(sum(costs[part]) for part in parts)


@given(COSTS, st.integers(1, 4))
def test_no_other_cut_has_a_smaller_largest_share(costs, count):
    parts = shares.cut(costs, count)
    assert len(parts) == count
    assert [i for part in parts for i in range(len(costs))[part]] == list(range(len(costs)))
    ends = range(len(costs) + 1)
    every = [[0, *sorted(inner), len(costs)] for inner in combinations([*ends] * (count - 1), count - 1)]
    best = min(max(sum(costs[a:b]) for a, b in pairwise(places)) for places in every)
    assert largest(costs, parts) <= best * (1 + 1e-6)


@given(COSTS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 2**28, 2**31]))
def test_every_client_is_in_one_share_of_one_turn(costs, count, pass_size, update_bytes):
    turns = list(shares.turns(costs, count, pass_size, update_bytes))
    assert all(len(turn) == count for turn in turns)
    assert [i for turn in turns for part in turn for i in range(len(costs))[part]] == list(range(len(costs)))


def sizes(*asked) -> list[list[int]]:
    return [[part.stop - part.start for part in turn] for turn in shares.turns(*asked)]


@pytest.mark.parametrize(
    ("clients", "processes", "pass_size", "expected"),
    [
        (16, 2, 4, [8, 8]),  # whole passes
        (16, 2, 16, [8, 8]),  # a pass in two
        (12, 2, 4, [6, 6]),  # three passes for two would keep one waiting
        (31, 2, 1, [16, 15]),
        (1, 2, 1, [1, 0]),  # the first one's
        (2, 3, 8, [1, 1, 0]),
    ],
)
def test_shares_are_whole_passes_where_nobody_waits_for_it(clients, processes, pass_size, expected):
    assert sizes([1.0] * clients, processes, pass_size, 0) == [expected]


def test_updates_that_fill_the_memory_are_trained_in_turns():
    assert sizes([1.0] * 10, 2, 2, shares.TURN_BYTES // 2) == [[2, 2], [2, 2], [1, 1]]
    assert sizes([1.0] * 3, 2, 1, 10 * shares.TURN_BYTES) == [[1, 1], [1, 0]]


@given(st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=5), st.integers(1, 4), st.booleans())
def test_rows_are_judged_once_in_their_order(items, count, weighted):
    work = [(i, np.array(rows, dtype=np.int64)) for i, rows in enumerate(items)]
    parts = shares.share_rows(work, np.arange(1, 32) if weighted else None, count)
    for place, (_, rows) in enumerate(work):
        found = [numbers for part in parts for i, numbers in part if i == place]
        assert found, "an item without rows is somebody's too"
        assert np.concatenate(found).tolist() == rows.tolist()
    if not weighted and items:
        counts = [sum(len(numbers) for _, numbers in part) for part in parts]
        assert max(counts) == -(-sum(counts) // count)
