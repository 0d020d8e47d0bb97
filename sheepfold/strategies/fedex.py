"""FedEx-LoRA: the means of the factors, and what they miss is added to the base.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   W <- W + (sum_k p_k s B_k A_k - s B A),   s = alpha / r

Together that is the mean of the products, exactly. The base itself stays as it is: the residuals add up in
`ServerState.side`, which every client is handed. They have the rank of all clients together, so after a few rounds they
are as large as the matrices; `residual_rank` keeps the best approximation of each round's instead.

Source: FedEx-LoRA, arXiv:2410.09432, section 4 and, for the truncated residual, its part on the best inexact
approximation. Deviation: p_k are the clients' shares of the rows unless weights is uniform, as the paper has it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from sheepfold.adapter import Adapter, Average, LoraPair, combined
from sheepfold.messages import Update
from sheepfold.products import ProductSum, best_rank
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, argument, weight, who


def fedex(residual_rank: int | None = None, weights: Weights = "rows") -> Strategy:
    """Return FedEx-LoRA over adapters of equal ranks; residual_rank: of the residual's best approximation, None: exact.

    Raises ConfigError for another residual rank than 1, 2, ... and None.
    """
    if residual_rank is not None:
        argument("residual_rank", residual_rank, "1, 2, ..., or null: exact", lambda rank: rank >= 1 and rank % 1 == 0)

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums: defaultdict[str, ProductSum] = defaultdict(ProductSum)
        average = Average()
        for update in updates:
            share = weight(update.measurements, weights)
            average.add(update.adapter, share, who(state, update))
            for name, pair in update.adapter.pairs.items():
                sums[name].add(pair, share)
        mean = average.finish()
        minus = Adapter({name: replace(pair, B=-pair.B) for name, pair in mean.pairs.items()})
        residual = combined(Adapter({name: total.exact() for name, total in sums.items()}), minus)
        if residual_rank is not None:
            residual = Adapter({name: _shortened(pair, int(residual_rank)) for name, pair in residual.pairs.items()})
        return state.advance(mean, side=combined(state.side, residual))

    return Strategy(name="fedex", fold=fold, weights=weights, pairs_only=True)


def _shortened(pair: LoraPair, rank: int) -> LoraPair:
    return best_rank(pair, min(rank, pair.A.shape[1], pair.B.shape[0]))
