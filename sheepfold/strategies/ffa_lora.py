"""FFA-LoRA: A stays at its random start, B trains and is averaged: the mean of the products, exactly.

    sum_k p_k s B_k A  =  s (sum_k p_k B_k) A

Nobody sends A, since every client draws it from the run's seed; only where the run starts from a folder's adapter does
the server hand it out.

Source: FFA-LoRA, arXiv:2403.12313, section 4.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from sheepfold.adapter import new_pair
from sheepfold.messages import Assignment, Update
from sheepfold.rng import torch_stream
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, factor_means, hand_out

SENT = "ffa_lora/A_is_sent"
"""In ServerState.memory where A is not the seed's draw."""


def ffa_lora(weights: Weights = "rows") -> Strategy:
    """Return FFA-LoRA over adapters of equal ranks."""

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        return state.advance(factor_means(state, updates, weights, unmoved={"A"}))

    return Strategy(name="ffa_lora", fold=fold, assign=assign, begin=begin, weights=weights, pairs_only=True)


def begin(state: ServerState) -> ServerState:
    """Return the state, with a note where clients cannot draw A for themselves."""
    return state if drawn(state) else replace(state, memory={**state.memory, SENT: torch.ones(1)})


def assign(state: ServerState, client: str, lr: float) -> Assignment:
    """Return the assignment with A frozen, and known unless noted otherwise."""
    handed = hand_out(state, client, lr)
    known = handed.known if SENT in state.memory else handed.known | {"A"}
    return replace(handed, frozen=frozenset({"A"}), known=known)


def drawn(state: ServerState) -> bool:
    """Return whether every A is the one that targets.new_adapter draws from the run's seed."""
    for path, pair in state.adapter.pairs.items():
        draw = torch_stream(state.setting.seed, "adapter", path)
        own = new_pair(pair.A.shape[1], pair.B.shape[0], pair.rank, pair.scale, draw)
        if not torch.equal(own.A, pair.A):
            return False
    return True
