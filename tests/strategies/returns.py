"""What clients return, without training: everything that trains has moved by random numbers, all else is as handed out.

What travels is what the engines say travels: no frozen kind, no private tensor, no positions.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from sheepfold.adapter import kind
from sheepfold.messages import Assignment, Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.rng import torch_stream
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy
from tests.strategies.cohorts import SHAPES, a_state

RANKS = {"q": 2, "v": 3}
ROWS = {"ann": 7, "bob": 20, "cleo": 3}


def a_start(seed: int = 0, clients: Iterable[str] = ROWS, alpha: float = 16.0) -> ServerState:
    """Return the state before round 1 of clients with equal ranks, with a base to look at."""
    state = a_state(dict.fromkeys(clients, RANKS), alpha, seed)
    return replace(state, setting=replace(state.setting, weight=base_weight))


def base_weight(path: str) -> torch.Tensor:
    """Return a base's weight, (d_out, d_in)."""
    d_in, d_out = SHAPES[path]
    return torch.randn(d_out, d_in, generator=torch_stream(0, "base", path))


def silent(method: Strategy, handed: Assignment) -> frozenset[str]:
    """Return the names that the engines list as unsent."""
    names = handed.adapter.tensors()
    return frozenset(n for n in names if kind(n) in handed.frozen | {"positions"} or method.private(n))


def returned(method: Strategy, state: ServerState, client: str, seed: int = 0) -> Update:
    """Return what a client returns from this state's round."""
    handed = method.assign(state, client, 1e-3)
    unsent = silent(method, handed)
    draw = torch_stream(seed, client, state.round)
    moved = {
        name: t + torch.randn(t.shape, generator=draw)
        for name, t in handed.adapter.tensors().items()
        if name not in unsent
    }
    n = ROWS[client]
    measured = Measurements(Mean(1.0, 1.0), n, n * 7, n * 3, n * 30, 2)
    return Update(client, handed.adapter.holding(moved), measured, unsent=unsent)


def a_round(method: Strategy, state: ServerState, clients: Iterable[str] = ROWS, seed: int = 0) -> ServerState:
    """Return the state after a round of these clients."""
    return method.fold(state, [returned(method, state, client, seed) for client in clients])


def some_rounds(method: Strategy, state: ServerState, rounds: int) -> ServerState:
    """Return the state after some rounds of everybody, the first included that the method begins with."""
    state = method.begin(state)
    for _ in range(rounds):
        state = a_round(method, state)
    return state
