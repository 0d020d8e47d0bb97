"""RoLoRA: B and A train in turn, one a round, and the trained one is averaged: exact every round.

    rounds 1, 3, ...   A frozen,  B = sum_k p_k B_k
    rounds 2, 4, ...   B frozen,  A = sum_k p_k A_k

Only the trained factor travels up. Both travel down, since a client may have missed rounds.

Source: RoLoRA, arXiv:2409.02346, Algorithm 1. B comes first: it starts at zero, where A has no gradient.
"""

from collections.abc import Iterable
from dataclasses import replace

from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, factor_means, hand_out


def rolora(weights: Weights = "rows") -> Strategy:
    """Return RoLoRA over adapters of equal ranks."""

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        return state.advance(factor_means(state, updates, weights, unmoved=resting(state)))

    return Strategy(name="rolora", fold=fold, assign=assign, weights=weights, pairs_only=True)


def assign(state: ServerState, client: str, lr: float) -> Assignment:
    """Return the assignment with this round's resting factor frozen."""
    return replace(hand_out(state, client, lr), frozen=resting(state))


def resting(state: ServerState) -> frozenset[str]:
    """Return the kind that does not train in the round after this state."""
    return frozenset({"A"} if state.round % 2 == 0 else {"B"})
