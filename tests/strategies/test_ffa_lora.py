"""FFA-LoRA: exact against the dense mean of products, an A that nobody sends, and starts that clients cannot draw."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sheepfold.adapter import nbytes
from sheepfold.state import load, save
from sheepfold.strategies.ffa_lora import SENT, ffa_lora
from sheepfold.targets import new_adapter
from tests.strategies.cohorts import CLIENTS, SHAPES, close, deltas, mean_product, same
from tests.strategies.returns import RANKS, a_round, a_start, returned


def from_the_seed(seed: int = 5):
    """Return the state before round 1 as a run makes it."""
    state = a_start(seed)
    sites = {path: nn.Linear(d_in, d_out) for path, (d_in, d_out) in SHAPES.items()}
    return replace(state, adapter=new_adapter(sites, RANKS, 16.0, seed))


@settings(max_examples=50)
@given(
    st.integers(0, 1000), st.lists(st.integers(1, 500), min_size=1, max_size=5), st.sampled_from(["rows", "uniform"])
)
def test_the_fold_is_the_mean_of_the_products_exactly(seed, rows, weights):
    method, state = ffa_lora(weights), a_start(seed, CLIENTS, alpha=3.0)
    updates = [replace(returned(method, state, "ann", seed + i), client=CLIENTS[i]) for i in range(len(rows))]
    updates = [replace(u, measurements=replace(u.measurements, rows=n)) for u, n in zip(updates, rows, strict=True)]
    p = np.ones(len(rows)) if weights == "uniform" else np.array(rows, dtype=float)
    close(deltas(method.fold(state, updates).adapter), mean_product(updates, p), size=10)


def test_order_of_arrival_leaves_it_alone():
    method, state = ffa_lora(), a_start()
    updates = [returned(method, state, client) for client in ("ann", "bob", "cleo")]
    close(deltas(method.fold(state, updates[::-1]).adapter), deltas(method.fold(state, updates).adapter))


def test_equal_clients_return_themselves():
    method, state = ffa_lora(), a_start()
    update = returned(method, state, "ann")
    folded = method.fold(state, [update, replace(update, client="bob"), replace(update, client="cleo")])
    for name, tensor in update.adapter.tensors().items():
        torch.testing.assert_close(folded.adapter.tensors()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_A_is_frozen_and_never_moves(dtype):
    method, start = ffa_lora(), a_start()
    state = start = replace(start, adapter=start.adapter.to(dtype))
    for cohort in (["ann"], ["bob", "cleo"], ["ann", "bob", "cleo"]):
        assert method.assign(state, "ann", 1e-3).frozen == {"A"}
        state = a_round(method, state, cohort)
    for path, pair in state.adapter.pairs.items():
        assert torch.equal(pair.A, start.adapter.pairs[path].A)
        assert not torch.equal(pair.B, start.adapter.pairs[path].B)


def test_only_B_travels_both_ways():
    method, state = ffa_lora(), ffa_lora().begin(from_the_seed())
    B = nbytes({name: t for name, t in state.adapter.tensors().items() if name.endswith("/B")})
    assert SENT not in state.memory
    assert method.assign(state, "ann", 1e-3).nbytes == B
    assert returned(method, state, "ann").nbytes == B


def test_clients_are_sent_an_A_that_they_cannot_draw(tmp_path):
    other = from_the_seed(seed=6).adapter  # as a PEFT folder's: not this run's draw
    method, state = ffa_lora(), ffa_lora().begin(replace(from_the_seed(seed=5), adapter=other))
    assert "A" not in method.assign(state, "ann", 1e-3).known
    state = a_round(method, state)
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    assert method.assign(read, "ann", 1e-3).nbytes == read.adapter.nbytes()
    assert returned(method, read, "ann").nbytes < read.adapter.nbytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_draw_is_known_by_the_runs_own_seed(seed):
    state = from_the_seed(seed)
    again = replace(state, setting=replace(state.setting, seed=seed + 1))
    assert "A" in ffa_lora().assign(ffa_lora().begin(state), "ann", 1e-3).known
    assert "A" not in ffa_lora().assign(ffa_lora().begin(again), "ann", 1e-3).known
