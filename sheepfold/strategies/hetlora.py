"""HetLoRA: zero-padding with weights by the size of each update, and clients that prune their own rank.

    A = sum_k q_k sqrt(s_k) pad(A_k),   B = sum_k q_k sqrt(s_k) pad(B_k),   q_k ~ p_k ||s_k B_k A_k||_F
    client of rank r:   starts from A[:r] / sqrt(s_r), B[:, :r] / sqrt(s_r), and minimises
        loss + lambda * sum over modules of ||A_k[c:]||_F ||B_k[:, c:]||_F,   c = floor(gamma r)

Weights and tails are those of each module. A pair whose tail shrank during the round is cut to rank c, and from then on
the server hands this client no more than that (`ServerState.memory`).

Source: HetLoRA, arXiv:2401.06432, section 3.2 (self-pruning, sparsity-weighted aggregation, truncation). Deviations:
p_k may weigh clients by their data (by default it is uniform, as in the paper); sqrt(alpha / r) goes with the factors,
so that ranks may differ under one alpha, and a cut pair's new scale is evened out in B; a tail that was handed out as
zeros is not cut, nor is rank 1; rows of A that no client of a round has stay as they were (see base.alive).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, Average
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.local.rules import Factors, LocalRule, Trained
from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import (
    Strategy,
    Weights,
    accept_all,
    alive,
    argument,
    check_modules,
    cut,
    cut_evenly,
    cut_to,
    hand_out,
    no_more,
    ranks_of,
    weight,
    who,
    widened_evenly,
    widest,
)
from sheepfold.strategies.heterolora import with_scale_1

RANKS = "hetlora/ranks"
"""In ServerState.memory, once a client pruned: (clients, modules) int64, as in Setting.clients and sorted by path."""


def hetlora(gamma: float | None = 0.99, regularisation: float | None = None, weights: Weights = "uniform") -> Strategy:
    """Return HetLoRA; gamma: the share of its rank that a client may prune to (None: never), regularisation: lambda.

    regularisation is 1e-3 where it is not given. Raises ConfigError unless 0 < gamma < 1 and regularisation >= 0, and
    for a regularisation without gamma.
    """
    if gamma is None and regularisation is not None:
        raise ConfigError("federation.strategy_args.regularisation has no effect with gamma null; remove it")
    if gamma is not None:
        gamma = argument("gamma", gamma, "between 0 and 1, or null: no pruning", lambda g: 0 < g < 1)
    factor = 1e-3 if regularisation is None else regularisation
    factor = argument("regularisation", factor, "at least 0", lambda value: value >= 0)

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums: defaultdict[tuple[str, bool], Average] = defaultdict(Average)
        extra, returned = Average(), dict[str, Mapping[str, int]]()
        for update in updates:
            check_modules(state, update)
            share, place = weight(update.measurements, weights), who(state, update)
            extra.add(Adapter(extra=update.adapter.extra), share, place)
            for name, pair in update.adapter.pairs.items():
                wide, norm = widened_evenly(pair, widest(state)[name]), pair.norm()
                sums[name, norm > 0].add(Adapter({name: wide}), share * (norm or 1.0), place)
            returned[update.client] = update.adapter.ranks
        # the updates of size zero count only where there is no other
        means = {n: sums[n, (n, True) in sums].finish().pairs[n] for n in state.adapter.pairs}
        adapter = alive(replace(extra.finish(), pairs=means), state.adapter)
        return state.advance(adapter, memory=_remembering(state, returned))

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        return hand_out(state, client, lr, cut_to(state, current_ranks(state, client), cut_evenly))

    return Strategy(
        name="hetlora",
        fold=fold,
        assign=assign,
        local=None if gamma is None else self_pruning(gamma, factor),
        check=accept_all if gamma is None else ranks_are_shared,
        begin=with_scale_1,
        beside=no_more,
        weights=weights,
        mixed_ranks=True,
        pairs_only=True,
    )


def ranks_are_shared(experiment: Experiment) -> None:
    """Refuse adapters of a client's own: a pair that is pruned has another shape than the one that was kept."""
    if experiment.personal.keep_local or experiment.personal.ditto:
        raise ConfigError(
            "federation.strategy hetlora: it prunes ranks, which personal.keep_local and personal.ditto hold fast; set "
            "federation.strategy_args.gamma to null, or remove them"
        )


def self_pruning(gamma: float, regularisation: float) -> LocalRule:
    """Return the client half: a penalty on the tails that drives them to zero, and the cut of those that shrank."""

    def penalty(factors: Factors) -> Tensor:
        now = factors.now
        tails = [
            tail(now[f"{name}/A"], now[f"{name}/B"], pruned(ranks, gamma)) for name, ranks in factors.ranks.items()
        ]
        return regularisation * torch.stack(tails).sum(0)

    def finish(assignment: Assignment, trained: Trained) -> Trained:
        pairs = dict(trained.adapter.pairs)
        for name, pair in pairs.items():
            start, rank = assignment.adapter.pairs[name], pruned(torch.tensor([pair.rank]), gamma)
            before = tail(start.A[None], start.B[None], rank)
            if tail(pair.A[None], pair.B[None], rank) < before:
                pairs[name] = cut(pair, int(rank), pair.scale * pair.rank / int(rank))
        return replace(trained, adapter=replace(trained.adapter, pairs=pairs))

    return LocalRule(penalty=penalty, finish=finish)


def pruned(ranks: Tensor, gamma: float) -> Tensor:
    """Return what these ranks would be pruned to: floor(gamma r), which is less than r; but 1 for rank 1."""
    return (ranks.double() * gamma).long().clamp(min=1)


def tail(A: Tensor, B: Tensor, first: Tensor) -> Tensor:
    """Return ||A_k[first_k:]||_F ||B_k[:, first_k:]||_F, (K,). A: (K, r, d_in), B: (K, d_out, r), first: (K,)."""
    rest = torch.arange(A.shape[1], device=A.device) >= first[:, None]
    of_A: Tensor = torch.linalg.matrix_norm(A * rest[:, :, None])
    of_B: Tensor = torch.linalg.matrix_norm(B * rest[:, None, :])
    return of_A * of_B


def current_ranks(state: ServerState, client: str) -> Mapping[str, int]:
    """Return a client's rank at each module, after what it pruned."""
    if RANKS not in state.memory:
        return ranks_of(state, client)
    return _row(state, list(state.setting.clients).index(client))


def _row(state: ServerState, number: int) -> Mapping[str, int]:
    row = state.memory[RANKS][number]
    return dict(zip(sorted(state.adapter.pairs), row.tolist(), strict=True))


def _remembering(state: ServerState, returned: Mapping[str, Mapping[str, int]]) -> Mapping[str, Tensor]:
    """Return the strategy's memory with the ranks that clients came back with, where these are not what they were."""
    modules, clients = sorted(state.adapter.pairs), list(state.setting.clients)
    ranks = {client: current_ranks(state, client) for client in returned}
    if all(returned[c][m] == ranks[c][m] for c in returned for m in modules):
        return state.memory
    before = [_row(state, i) if RANKS in state.memory else ranks_of(state, c) for i, c in enumerate(clients)]
    known = [returned.get(c) or own for c, own in zip(clients, before, strict=True)]
    return {**state.memory, RANKS: torch.tensor([[ranks[m] for m in modules] for ranks in known])}
