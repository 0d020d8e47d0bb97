"""SLoRA: first the weights themselves train, sparsely; then LoRA starts from what they learned.

    rounds 1 .. stage_rounds:   W + D,   D = sum_k p_k D_k,   each D_k at the positions of one random mask
    then, in the inner method:  A = V_r^T,   B = U_r S_r / s   of D = U S V^T,   s = alpha / r

The mask is drawn from the run's seed, one a module, and shared by all clients and rounds, so only values travel, and
their mean is as sparse as they are. Nothing but the values exists, so weight decay moves no masked weight. LoRA's start
holds the best rank-r part of D; the rest is dropped, as in the paper, or kept beside the base.

Source: SLoRA, arXiv:2308.06522, section 4. FlexLoRA's release draws another mask for every client and round, and lets
weight decay move masked weights; this is the paper's. Our addition: where D has a lower rank than LoRA, the rows of A
that are left start at random beside zero columns of B, as LoRA's own do (see base.alive).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, LoraPair, SparseDelta, combined, from_delta, new_pair
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError, suggest
from sheepfold.messages import Assignment, Update
from sheepfold.products import best_rank
from sheepfold.rng import stream, torch_stream
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, alive, argument, factor_means, hand_out, not_together, parts_of, widest

THEN = ("fedavg", "fedit", "fedex", "flexlora", "heterolora")
"""The methods that go on with both factors of a start that is not zero."""
RESIDUALS = ("drop", "keep")


def slora(of: Strategy, stage_rounds: int = 5, density: float = 0.05, residual: str = "drop") -> Strategy:
    """Return a method that starts from sparse rounds; density: the share of each weight matrix that trains in them.

    Raises ConfigError for inner methods that have a start of their own.
    """
    stage_rounds = int(argument("stage_rounds", stage_rounds, "a whole number above 0", lambda x: x > 0 and x % 1 == 0))
    density = argument("density", density, "above 0 and at most 1", lambda x: 0 < x <= 1)
    if residual not in RESIDUALS:
        raise ConfigError(f"federation.strategy_args.residual: no {residual!r}; {suggest(str(residual), RESIDUALS)}")
    *between, last = parts_of(of)
    if last not in THEN:
        why = f"slora hands over to a method that trains both factors from any start, and {last} has one of its own"
        raise not_together("slora", of, f"{why}; slora goes with {', '.join(THEN)}")
    if odd := sorted(set(between) - {"fedprox"}):
        why = f"{odd[0]} inside slora would begin in the middle of the run"
        raise not_together("slora", of, f"{why}; only fedprox goes there, and server optimizers go before slora")

    def begin(state: ServerState) -> ServerState:
        return weights_train(state, partial(masked, state.setting.seed, density))

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        return (hand_out if state.adapter.sparse else of.assign)(state, client, lr)

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        if not state.adapter.sparse:
            return of.fold(state, updates)
        learned = factor_means(state, updates, of.weights)
        if state.round + 1 < stage_rounds:
            return state.advance(learned)
        return of.begin(lora_starts(state, learned, keep=residual == "keep"))

    def check(experiment: Experiment) -> None:
        of.check(experiment)
        from_the_base("slora", experiment)
        if stage_rounds >= experiment.federation.rounds:
            raise ConfigError(
                f"federation.strategy_args.stage_rounds {stage_rounds}: LoRA would never start in "
                f"{experiment.federation.rounds} rounds; make stage_rounds smaller, or federation.rounds larger"
            )

    made = replace(of, name=f"slora + {of.name}", begin=begin, assign=assign, fold=fold, check=check)
    return replace(made, pairs_only=True, beyond_peft=True)


def masked(seed: int, density: float, path: str, numbers: int) -> Tensor:
    """Return the positions of a module's mask, ascending int64, at least one of them."""
    n = max(1, round(density * numbers))
    drawn = stream(seed, "slora", path).choice(numbers, n, replace=False, shuffle=False)
    return torch.from_numpy(drawn).sort().values


def weights_train(state: ServerState, positions: Callable[[str, int], Tensor]) -> ServerState:
    """Return the state in which the adapted weights themselves are about to train, at these positions.

    positions: (module path, numbers of its weight) -> (n,) ascending. The ranks that were there are the widest.
    """
    sparse = {}
    for path, pair in state.adapter.pairs.items():
        shape = (pair.B.shape[0], pair.A.shape[1])
        at = positions(path, shape[0] * shape[1])
        sparse[path] = SparseDelta(pair.B.new_zeros(len(at)), at, shape)
    setting = replace(state.setting, widest=widest(state))
    return replace(state, adapter=Adapter({}, state.adapter.extra, sparse), setting=setting)


def best_pairs(state: ServerState, learned: Adapter) -> dict[str, LoraPair]:
    """Return the pair nearest to each weight's change, of the module's largest rank r and scale alpha / r."""
    ranks, alpha = widest(state), state.setting.alpha
    deltas = {path: from_delta(delta.delta(delta.values.dtype)) for path, delta in learned.sparse.items()}
    return {path: best_rank(delta, ranks[path], alpha / ranks[path]) for path, delta in deltas.items()}


def lora_starts(state: ServerState, learned: Adapter, keep: bool) -> ServerState:
    """Return the next state, with pairs for what the weights learned; keep: what they miss goes beside the base."""
    best, side = best_pairs(state, learned), state.side
    if keep:
        rest = {path: from_delta(delta.delta() - best[path].delta()) for path, delta in learned.sparse.items()}
        side = combined(side, Adapter(rest).to(next(iter(best.values())).A.dtype))
    fresh = {path: _fresh(state, path, pair) for path, pair in best.items()}
    return state.advance(alive(Adapter(best, learned.extra), Adapter(fresh)), side=side)


def _fresh(state: ServerState, path: str, pair: LoraPair) -> LoraPair:
    draw = torch_stream(state.setting.seed, "adapter", path)
    return new_pair(pair.A.shape[1], pair.B.shape[0], pair.rank, pair.scale, draw)


def from_the_base(name: str, experiment: Experiment) -> None:
    """Refuse an experiment that starts from an adapter, which a method that makes its own would forget."""
    if start := experiment.adapter.start:
        raise ConfigError(
            f"federation.strategy {name}: it makes the adapter it starts from; remove adapter.start {start}"
        )
