"""FedSA-LoRA: A is shared, and no B ever leaves its client."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.adapter import kind, nbytes
from sheepfold.state import load, save
from sheepfold.strategies.fedsa import fedsa
from tests.strategies.cohorts import an_adapter, same
from tests.strategies.returns import RANKS, ROWS, a_round, a_start, returned, some_rounds


def test_every_B_is_private_and_nothing_else():
    assert {name for name in a_start().adapter.tensors() if fedsa().private(name)} == {"q/B", "v/B"}


@settings(max_examples=30)
@given(st.sets(st.sampled_from(list(ROWS)), min_size=1), st.sampled_from(["rows", "uniform"]), st.integers(0, 99))
def test_A_is_the_weighted_mean_and_B_stays_to_the_bit(there, weights, seed):
    method, state = fedsa(weights), a_start(seed)
    updates = [returned(method, state, client, seed) for client in sorted(there)]
    after = method.fold(state, updates).adapter
    p = [ROWS[u.client] if weights == "rows" else 1.0 for u in updates]
    for path, pair in after.pairs.items():
        expected = np.average([u.adapter.pairs[path].A.double().numpy() for u in updates], axis=0, weights=p)
        np.testing.assert_allclose(pair.A.numpy(), expected, rtol=0, atol=1e-5)
        assert torch.equal(pair.B, state.adapter.pairs[path].B)


def test_a_B_of_zeros_need_not_travel():
    method, state = fedsa(), some_rounds(fedsa(), a_start(), 2)
    B = nbytes({name: t for name, t in state.adapter.tensors().items() if kind(name) == "B"})
    assert method.assign(state, "ann", 1e-3).nbytes == state.adapter.nbytes() - B
    assert returned(method, state, "ann").nbytes == state.adapter.nbytes() - B


def test_the_B_of_a_folder_is_handed_out_and_does_not_come_back():
    method, state = fedsa(), replace(a_start(), adapter=an_adapter(3, RANKS))
    B = nbytes({name: t for name, t in state.adapter.tensors().items() if kind(name) == "B"})
    assert method.assign(state, "ann", 1e-3).nbytes == state.adapter.nbytes()
    assert returned(method, state, "ann").nbytes == state.adapter.nbytes() - B


def test_order_of_arrival_leaves_it_alone():
    method, state = fedsa(), a_start()
    updates = [returned(method, state, client) for client in ROWS]
    there, back = method.fold(state, updates).adapter.tensors(), method.fold(state, updates[::-1]).adapter.tensors()
    for name in there:
        torch.testing.assert_close(back[name], there[name])


def test_the_state_survives_the_disk(tmp_path):
    state = some_rounds(fedsa(), a_start(), 2)
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    same(a_round(fedsa(), read), a_round(fedsa(), state))
