"""FLoRA: the mean of the clients' products, exactly, added to the base; clients start afresh every round.

    W <- W + sum_k p_k s_k B_k A_k  =  W + [p_1 s_1 B_1 | p_2 s_2 B_2 | ...] @ [A_1; A_2; ...],   s_k = alpha / r_k

The base itself stays as it is: what is added to it is `ServerState.side`, which every client is handed. The adapter of
the next round has a new random A and a zero B; a client of rank r gets A's first r rows.

Source: FLoRA, arXiv:2409.05976, section 3 (eq. 5, with alpha / r folded into B, so mixed ranks and scales are exact).
"""

from collections.abc import Iterable

from sheepfold.adapter import Adapter, LoraPair, combined, new_pair
from sheepfold.messages import Update
from sheepfold.rng import torch_stream
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, hand_out_cut, product_sums, widest


def flora(weights: Weights = "rows") -> Strategy:
    """Return FLoRA over adapters of any ranks. Whole tensors are averaged and travel on in the adapter."""

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums, extra = product_sums(state, updates, weights)
        learned = Adapter({name: total.exact() for name, total in sums.items()})
        fresh = {name: _afresh(state, name, pair) for name, pair in state.adapter.pairs.items()}
        return state.advance(Adapter(fresh, extra), side=combined(state.side, learned))

    return Strategy(
        name="flora",
        fold=fold,
        assign=hand_out_cut,
        weights=weights,
        mixed_ranks=True,
        averages="products",
        pairs_only=True,
    )


def _afresh(state: ServerState, name: str, pair: LoraPair) -> LoraPair:
    rank = widest(state)[name]
    draw = torch_stream(state.setting.seed, "flora", state.round + 1, name)
    return new_pair(pair.A.shape[1], pair.B.shape[0], rank, state.setting.alpha / rank, draw)
