"""RoLoRA: the factors train in turn, every round exact, and only the trained one goes up."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.adapter import kind, nbytes
from sheepfold.state import load, save
from sheepfold.strategies.rolora import rolora
from tests.strategies.cohorts import close, deltas, mean_product, same
from tests.strategies.returns import ROWS, a_round, a_start, returned, some_rounds


def test_B_trains_first_then_A_then_B():
    state, trained = a_start(), []
    for _ in range(4):
        after = a_round(rolora(), state)
        old, new = state.adapter.tensors(), after.adapter.tensors()
        trained.append({kind(name) for name in old if not torch.equal(old[name], new[name])})
        state = after
    assert trained == [{"B", "extra"}, {"A", "extra"}, {"B", "extra"}, {"A", "extra"}]


@settings(max_examples=30)
@given(
    st.integers(0, 1000),
    st.integers(0, 3),
    st.sampled_from(["rows", "uniform"]),
    st.sets(st.sampled_from(list(ROWS)), min_size=1),
)
def test_every_round_is_the_mean_of_the_products_exactly(seed, rounds, weights, there):
    method = rolora(weights)
    state = some_rounds(method, a_start(seed), rounds)
    updates = [returned(method, state, client, seed) for client in sorted(there)]
    p = np.array([ROWS[u.client] if weights == "rows" else 1.0 for u in updates])
    close(deltas(method.fold(state, updates).adapter), mean_product(updates, p), size=100)


@pytest.mark.parametrize(("rounds", "rests"), [(0, "A"), (1, "B"), (2, "A")])
def test_the_trained_factor_goes_up_and_both_come_down(rounds, rests):
    state = some_rounds(rolora(), a_start(), rounds)
    handed, update = rolora().assign(state, "ann", 1e-3), returned(rolora(), state, "ann")
    resting = nbytes({name: t for name, t in state.adapter.tensors().items() if kind(name) == rests})
    assert handed.frozen == {rests}
    assert handed.nbytes == state.adapter.nbytes()
    assert update.nbytes == state.adapter.nbytes() - resting


def test_a_client_that_missed_rounds_starts_where_the_others_do():
    state = a_round(rolora(), a_round(rolora(), a_start(), ["ann"]), ["bob"])
    assert rolora().assign(state, "cleo", 1e-3).adapter is state.adapter


def test_order_of_arrival_and_equal_clients_leave_it_alone():
    method, state = rolora(), a_start()
    updates = [returned(method, state, client) for client in ROWS]
    close(deltas(method.fold(state, updates[::-1]).adapter), deltas(method.fold(state, updates).adapter))
    same_twice = [updates[0], replace(updates[0], client="bob")]
    close(deltas(method.fold(state, same_twice).adapter), deltas(updates[0].adapter), size=10)


def test_the_state_survives_the_disk(tmp_path):
    state = some_rounds(rolora(), a_start(), 3)
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    same(a_round(rolora(), read), a_round(rolora(), state))
