"""FedSA-LoRA: A is averaged, B stays with its client.

    A = sum_k p_k A_k,   client k has W + s B_k A

Each client goes on with the B it had; one that has none yet starts from the adapter's first B, which is zero unless the
run starts from a folder's adapter. That one never changes, so the global adapter alone is the base: what counts is each
client's own.

Source: FedSA-LoRA, arXiv:2410.01463, section 3 (A learns what all share, B what is the client's own).
"""

from collections.abc import Iterable
from dataclasses import replace

from sheepfold.adapter import kind
from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, factor_means, hand_out


def fedsa(weights: Weights = "rows") -> Strategy:
    """Return FedSA-LoRA over adapters of equal ranks."""

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        return state.advance(factor_means(state, updates, weights, unmoved={"B"}))

    return Strategy(name="fedsa", fold=fold, assign=assign, private=is_B, weights=weights, pairs_only=True)


def assign(state: ServerState, client: str, lr: float) -> Assignment:
    """Return the assignment; a B of zeros need not travel."""
    handed = hand_out(state, client, lr)
    given = any(bool(pair.B.any()) for pair in state.adapter.pairs.values())
    return handed if given else replace(handed, known=handed.known | {"B"})


def is_B(name: str) -> bool:
    """Return whether a flat name is a B's."""
    return kind(name) == "B"
