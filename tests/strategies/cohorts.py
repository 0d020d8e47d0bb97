"""Cohorts of updates for tests of strategies: mixed ranks, weights, alphas and absences, and a dense float64 oracle.

The oracle is numpy alone and knows nothing of sheepfold.adapter's algebra: it multiplies factors out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair, new_pair
from sheepfold.messages import Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.rng import torch_stream
from sheepfold.state import BatchPlan, ServerState, Setting, load, save
from sheepfold.strategies.base import Strategy

Dense = Mapping[str, np.ndarray]
"""Module path -> (d_out, d_in) float64."""

SHAPES = {"v": (4, 7), "q": (6, 5)}
"""Module path -> (d_in, d_out); not in the order of their names."""
CLIENTS = ("ann", "bob", "cleo", "dora", "emil")
LARGEST = 4

few = settings(max_examples=30)
"""For laws that hold for one reason everywhere: the examples that find a fault are the first ones."""


@dataclass(frozen=True)
class Cohort:
    """A state, and the updates of those clients that came back, in client order."""

    state: ServerState
    updates: Sequence[Update]

    @property
    def rows(self) -> np.ndarray:
        """What the clients weigh by their rows."""
        return np.array([update.measurements.rows for update in self.updates], dtype=np.float64)

    @property
    def size(self) -> float:
        """A number that the entries of these updates are of the order of, for tolerances."""
        return 1.0 + max(float(np.abs(dense(p)).max()) for u in self.updates for p in u.adapter.pairs.values())


def an_adapter(seed: int, ranks: Mapping[str, int], alpha: float = 16.0) -> Adapter:
    """Return an adapter whose A and B both hold random numbers, and whose head does."""
    draw = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (d_in, d_out) in SHAPES.items():
        A, B = torch.randn(ranks[name], d_in, generator=draw), torch.randn(d_out, ranks[name], generator=draw)
        pairs[name] = LoraPair(A, B, alpha / ranks[name])
    return Adapter(pairs, {"head": torch.randn(2, 3, generator=draw)})


def an_update(client: str, adapter: Adapter, rows: int = 10) -> Update:
    """Return what a client with this many rows returns."""
    return Update(client, adapter, Measurements(Mean(1.0, 1.0), rows, rows * 7, rows * 3, rows * 30, 2))


def a_state(ranks: Mapping[str, Mapping[str, int]], alpha: float = 16.0, seed: int = 0) -> ServerState:
    """Return the state before round 1 of a federation with these ranks: A random, B zero, of the largest ranks."""
    widest = {name: max(own[name] for own in ranks.values()) for name in SHAPES}
    pairs = {
        name: new_pair(d_in, d_out, widest[name], alpha / widest[name], torch_stream(seed, "fresh", name))
        for name, (d_in, d_out) in SHAPES.items()
    }
    setting = Setting(seed=seed, clients=tuple(ranks), ranks=ranks, widest=widest, alpha=alpha)
    return ServerState(0, Adapter(pairs, {"head": torch.zeros(2, 3)}), BatchPlan(1, 1, 1), setting=setting)


def updates_of(state: ServerState, rows: Mapping[str, int], seed: int) -> list[Update]:
    """Return one random update for each of these clients, in client order, at its own ranks."""
    setting = state.setting
    return [
        an_update(client, an_adapter(seed * 101 + i, setting.ranks[client], setting.alpha), rows[client])
        for i, client in enumerate(setting.clients)
        if client in rows
    ]


@st.composite
def cohorts(draw: st.DrawFn, mixed: bool = True) -> Cohort:
    """Return a federation's state and one round's updates; mixed: clients and modules may have different ranks."""
    rank = st.integers(1, LARGEST)
    own = {name: draw(rank) for name in SHAPES}
    count = draw(st.integers(1, len(CLIENTS)))
    ranks = {c: {name: draw(rank) for name in SHAPES} if mixed else own for c in CLIENTS[:count]}
    alpha = draw(st.sampled_from([1.0, 3.0, 16.0]))
    seed = draw(st.integers(0, 1000))
    present = draw(st.lists(st.sampled_from(CLIENTS[:count]), min_size=1, unique=True))
    rows = {client: draw(st.integers(1, 1000)) for client in present}
    state = a_state(ranks, alpha, seed)
    return Cohort(state, updates_of(state, rows, seed + 1))


def dense(pair: LoraPair) -> np.ndarray:
    """Return scale * B @ A of one pair, multiplied out in float64."""
    return pair.scale * (pair.B.double().numpy() @ pair.A.double().numpy())


def deltas(adapter: Adapter) -> Dense:
    """Return what an adapter adds to each weight."""
    return {name: dense(pair) for name, pair in adapter.pairs.items()}


def mean_product(updates: Sequence[Update], weights: np.ndarray) -> Dense:
    """Return sum_k p_k s_k B_k A_k, with p_k = weights_k / sum weights."""
    shares = weights / weights.sum()
    return {
        name: sum(p * dense(u.adapter.pairs[name]) for p, u in zip(shares, updates, strict=True)) for name in SHAPES
    }


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the matrix of this rank nearest to another one, by numpy's own SVD."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def learned(state: ServerState) -> Dense:
    """Return all that a state adds to each weight of the base."""
    return deltas(state.whole().plain())


def close(found: Dense, expected: Dense, size: float = 1.0) -> None:
    """Assert that two sets of matrices are equal up to float32's rounding of numbers of this size."""
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[name], matrix, rtol=0, atol=1e-5 * size, err_msg=name)


def same(left: ServerState, right: ServerState) -> None:
    """Assert that two states hold the same bits."""
    assert left.round == right.round
    assert left.adapter.hash() == right.adapter.hash()
    assert left.side.hash() == right.side.hash()
    assert left.memory.keys() == right.memory.keys()
    assert all(torch.equal(tensor, right.memory[name]) for name, tensor in left.memory.items())


def arrival_leaves_it_alone(method: Strategy, cohort: Cohort) -> None:
    """Assert the same bits for updates in client order, however often, and the same up to rounding in another order."""
    folded = method.fold(cohort.state, iter(cohort.updates))
    same(method.fold(cohort.state, iter(cohort.updates)), folded)
    close(learned(method.fold(cohort.state, reversed(cohort.updates))), learned(folded), cohort.size)


def scale_of_weights_leaves_it_alone(method: Strategy, cohort: Cohort) -> None:
    """Assert that seven times the rows everywhere change nothing."""
    more = [an_update(u.client, u.adapter, 7 * u.measurements.rows) for u in cohort.updates]
    close(learned(method.fold(cohort.state, more)), learned(method.fold(cohort.state, cohort.updates)), cohort.size)


def equal_clients_return_themselves(method: Strategy, cohort: Cohort) -> None:
    """Assert that clients which all return the same adapter are handed its product next."""
    first = cohort.updates[0]
    equal = [an_update(u.client, first.adapter, u.measurements.rows) for u in cohort.updates]
    folded = method.fold(cohort.state, equal)
    given = method.assign(folded, first.client, 1e-3)
    both = replace(folded, adapter=given.adapter)
    close(learned(both), deltas(first.adapter), cohort.size)
    torch.testing.assert_close(given.adapter.extra["head"], first.adapter.extra["head"])


def whole_tensors_are_averaged(method: Strategy, cohort: Cohort, weights: np.ndarray) -> None:
    """Assert that the global head is the weighted mean of the clients' heads, and reaches them."""
    folded = method.fold(cohort.state, cohort.updates)
    heads = [u.adapter.extra["head"].double().numpy() for u in cohort.updates]
    expected = np.average(heads, axis=0, weights=weights)
    for client in cohort.state.setting.clients:
        given = method.assign(folded, client, 1e-3).adapter.extra["head"]
        np.testing.assert_allclose(given.numpy(), expected, rtol=0, atol=1e-5)


def handed_out_as_declared(method: Strategy, cohort: Cohort) -> None:
    """Assert that every client is handed its own ranks with scale alpha / r, before round 1 and later."""
    setting = cohort.state.setting
    for state in (method.begin(cohort.state), method.fold(method.begin(cohort.state), cohort.updates)):
        for client in setting.clients:
            given = method.assign(state, client, 1e-3)
            assert given.adapter.ranks == setting.ranks[client]
            assert given.side is state.side
            for pair in given.adapter.pairs.values():
                assert pair.scale == setting.alpha / pair.rank


def every_rank_can_train(method: Strategy) -> None:
    """Assert that a large client has no dead rows after a round in which only a small one took part."""
    state = method.begin(a_state({"ann": dict.fromkeys(SHAPES, 1), "bob": dict.fromkeys(SHAPES, 4)}))
    folded = method.fold(state, updates_of(state, {"ann": 3}, seed=1))
    for pair in method.assign(folded, "bob", 1e-3).adapter.pairs.values():
        assert np.linalg.matrix_rank(pair.A.numpy()) == 4


def survives_the_disk(method: Strategy, cohort: Cohort, path: Path) -> None:
    """Assert that a state of this method's making comes back from its file, and goes on from there with equal bits."""
    state = method.fold(method.fold(cohort.state, cohort.updates), cohort.updates)
    save(state, path)
    read = load(path, cohort.state.setting)
    same(read, state)
    same(method.fold(read, cohort.updates), method.fold(state, cohort.updates))
