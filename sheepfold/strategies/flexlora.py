"""FlexLoRA: the mean of the clients' products, and for every client the best pair of its own rank.

    dW = sum_k p_k s_k B_k A_k = U S V^T,   s_k = alpha / r_k
    client of rank r:   A = V_r^T,   B = U_r S_r / s_r

V_r and U_r hold the first r singular vectors, so what a client is handed is the rank-r matrix nearest to dW
(Eckart-Young), and dW itself where its rank is at most r. The global adapter is the pair of the largest rank, in this
form, so handing out is truncation: one SVD per matrix and round, whatever the number of clients.

Source: FlexLoRA, arXiv:2402.11505, section 3.2. Deviation: where dW has a lower rank than the largest client, A keeps
rows of the round before beside zero columns of B, so that this client can train its whole rank (see base.alive).
"""

from collections.abc import Iterable

import torch

from sheepfold.adapter import Adapter
from sheepfold.errors import ConfigError, suggest
from sheepfold.messages import Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, alive, hand_out_cut, product_sums, widest

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


def flexlora(precision: str = "float32", weights: Weights = "rows") -> Strategy:
    """Return FlexLoRA; the sum of products and its SVD have this precision, and what comes of them is float32.

    Whole tensors are averaged. Raises ConfigError for another precision than float32 and float64.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"federation.strategy_args.precision: no {precision!r}; {suggest(precision, PRECISIONS)}")

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums, extra = product_sums(state, updates, weights, PRECISIONS[precision])
        ranks, alpha = widest(state), state.setting.alpha
        best = {name: total.best_rank(ranks[name], alpha / ranks[name]) for name, total in sums.items()}
        learned = Adapter(best, extra).to(torch.float32)
        return state.advance(alive(learned, state.adapter))

    return Strategy(
        name="flexlora",
        fold=fold,
        assign=hand_out_cut,
        weights=weights,
        mixed_ranks=True,
        averages="products",
        pairs_only=True,
    )
