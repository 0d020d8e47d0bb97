"""HeteroLoRA: pad to the largest rank with zeros, average the factors, truncate to each client's rank.

    A = sum_k p_k sqrt(s_k) pad(A_k),   B = sum_k p_k sqrt(s_k) pad(B_k),   s_k = alpha / r_k
    client of rank r:   A[:r] / sqrt(s_r),   B[:, :r] / sqrt(s_r)

The global pair then has scale 1. Without handle_alpha the square roots are left out: factors are averaged raw, and
every client multiplies them by its own alpha / r, the global adapter by alpha / (largest r).

Source: the zero-padding baseline in FlexLoRA's repository (alibaba/FederatedScope, branch FlexLoRA, heterolora.py),
which never hands its averages out, and fixes alpha at 16 and the largest rank at 360. HetLoRA's weights and pruning are
in hetlora.py. Deviation: rows of A that no client of a round has stay as they were, beside zero columns of B (see
base.alive).
"""

from collections.abc import Iterable
from dataclasses import replace

from sheepfold.adapter import Average, LoraPair, pad, truncate
from sheepfold.errors import ConfigError
from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import (
    Strategy,
    Weights,
    alive,
    as_it_is,
    cut_evenly,
    cut_to,
    hand_out,
    ranks_of,
    weight,
    who,
    widened_evenly,
    widest,
)


def heterolora(handle_alpha: bool = True, weights: Weights = "rows") -> Strategy:
    """Return HeteroLoRA over adapters of any ranks, with alpha / r taken into account or not.

    Raises ConfigError for a handle_alpha that is neither true nor false.
    """
    if not isinstance(handle_alpha, bool):
        raise ConfigError(f"federation.strategy_args.handle_alpha: found {handle_alpha!r}, expected true or false")

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        average, ranks = Average(), widest(state)
        for update in updates:
            wide = {
                name: widened_evenly(pair, ranks[name])
                if handle_alpha
                else pad(replace(pair, scale=state.setting.alpha / ranks[name]), ranks[name])
                for name, pair in update.adapter.pairs.items()
            }
            average.add(replace(update.adapter, pairs=wide), weight(update.measurements, weights), who(state, update))
        return state.advance(alive(average.finish(), state.adapter))

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        by = cut_evenly if handle_alpha else cut_raw
        return hand_out(state, client, lr, cut_to(state, ranks_of(state, client), by))

    return Strategy(
        name="heterolora",
        fold=fold,
        assign=assign,
        begin=with_scale_1 if handle_alpha else as_it_is,
        weights=weights,
        mixed_ranks=True,
        pairs_only=True,
    )


def cut_raw(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    """Return the first `rank` rows of A and columns of B as they are, under another scale."""
    return replace(truncate(pair, rank), scale=scale)


def with_scale_1(state: ServerState) -> ServerState:
    """Return the state with its adapter's scales moved into the factors, the form in which the fold leaves it."""
    pairs = {name: widened_evenly(pair, pair.rank) for name, pair in state.adapter.pairs.items()}
    return replace(state, adapter=replace(state.adapter, pairs=pairs))
