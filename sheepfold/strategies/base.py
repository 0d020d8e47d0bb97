"""What a strategy is: who is handed what, what clients do besides descending their loss, and how updates fold."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, Average, LoraPair, kind, pad, truncate
from sheepfold.config import Experiment
from sheepfold.errors import AdapterMismatch, ConfigError
from sheepfold.local.rules import LocalRule
from sheepfold.messages import Assignment, Measurements, Update
from sheepfold.products import ProductSum
from sheepfold.state import ServerState

if TYPE_CHECKING:
    from sheepfold.assembly import Parts
    from sheepfold.distillation.teacher import Foreseen

Weights = Literal["rows", "target_tokens", "processed_rows", "uniform"]


def weight(measured: Measurements, weights: Weights) -> float:
    """Return a client's weight in the fold, before the weights are made to sum to 1."""
    if weights == "uniform":
        return 1.0
    return float(getattr(measured, weights))


def who(state: ServerState, update: Update) -> str:
    """Return the place of an update, for messages."""
    return f"round {state.round + 1}, client {update.client!r}"


def hand_out(state: ServerState, client: str, lr: float, adapter: Adapter | None = None) -> Assignment:
    """Return the assignment that starts from this adapter (None: the global one), with all that goes with it."""
    start = state.adapter if adapter is None else adapter
    drawn, last = state.drawn.get(client, 0), state.counted.get(client, 0)
    return Assignment(client, state.round, start, lr, first_step=drawn, side=state.side, last=last)


def hand_out_global(state: ServerState, client: str, lr: float) -> Assignment:
    """Return the assignment most methods make: start from the global adapter."""
    return hand_out(state, client, lr)


def check_modules(state: ServerState, update: Update) -> None:
    """Raise AdapterMismatch unless an update has exactly the global adapter's pairs."""
    if odd := sorted(update.adapter.pairs.keys() ^ state.adapter.pairs.keys()):
        raise AdapterMismatch(
            f"{who(state, update)}: {odd[0]} is in one adapter only; all clients must adapt the same modules"
        )


def ranks_of(state: ServerState, client: str) -> Mapping[str, int]:
    """Return a client's rank at each module."""
    return state.setting.ranks.get(client) or widest(state)


def widest(state: ServerState) -> Mapping[str, int]:
    """Return the global adapter's rank at each module: the largest of any client."""
    return state.setting.widest or state.adapter.ranks


def cut(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    """Return the first `rank` rows of A and columns of B, rescaled in B: the product of what is left is the same.

    Of a pair in SVD form (A = V^T, B = U S) this is the best pair of that rank.
    """
    short = truncate(pair, rank)
    return LoraPair(short.A, short.B * (pair.scale / scale), scale)


def cut_evenly(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    """Return what `cut` does, with the change of scale shared between A and B, sqrt(scale / new scale) each."""
    short = truncate(pair, rank)
    share = (pair.scale / scale) ** 0.5
    return LoraPair(short.A * share, short.B * share, scale)


def widened_evenly(pair: LoraPair, rank: int) -> LoraPair:
    """Return the pair padded to a rank, its scale moved into A and B, sqrt(scale) each: scale 1, the same product."""
    share = pair.scale**0.5
    return pad(LoraPair(pair.A * share, pair.B * share, 1.0), rank)


Cut = Callable[[LoraPair, int, float], LoraPair]
"""(pair, rank, scale) -> the pair of that rank and scale."""


def cut_to(state: ServerState, ranks: Mapping[str, int], by: Cut = cut) -> Adapter:
    """Return the global adapter cut to these ranks, `by` one of the above; a pair of rank r gets scale alpha / r."""
    if not (_cuts and _cuts[-1].of is state.adapter):
        _cuts[:] = [_Cuts(state.adapter, {})]
    key, alpha = (id(by), tuple(ranks.items())), state.setting.alpha
    made = _cuts[-1].made
    if key not in made:
        pairs = {name: by(pair, ranks[name], alpha / ranks[name]) for name, pair in state.adapter.pairs.items()}
        made[key] = replace(state.adapter, pairs=pairs)
    return made[key]


@dataclass(slots=True)
class _Cuts:
    of: Adapter
    made: dict[Any, Adapter]


_cuts: list[_Cuts] = []
"""What the last global adapter was cut to: clients of one type are handed one value, not a copy each."""


def hand_out_cut(state: ServerState, client: str, lr: float) -> Assignment:
    """Return the assignment that starts from the global adapter, cut to the client's ranks."""
    return hand_out(state, client, lr, cut_to(state, ranks_of(state, client)))


def alive(adapter: Adapter, before: Adapter) -> Adapter:
    """Return the same product, with the rows of A that died as they were before.

    A row of zeros in A beside a column of zeros in B has no gradient, so it would never train again. That happens where
    no client of a round had a rank large enough, and is our own addition to the methods that use it.
    """
    pairs = {}
    for name, pair in adapter.pairs.items():
        old, dead = before.pairs[name], (pair.A == 0).all(1) & (pair.B == 0).all(0)
        rows = (old.A * (old.scale / pair.scale) ** 0.5).to(pair.A)
        pairs[name] = replace(pair, A=torch.where(dead[:, None], rows, pair.A))
    return replace(adapter, pairs=pairs)


def factor_means(
    state: ServerState, updates: Iterable[Update], weights: Weights, unmoved: Collection[str] = ()
) -> Adapter:
    """Return the weighted mean of every tensor; the kinds that nobody trained stay the global adapter's, to the bit."""
    average = Average()
    for update in updates:
        average.add(update.adapter, weight(update.measurements, weights), who(state, update))
    kept = {name: t for name, t in state.adapter.tensors().items() if kind(name) in unmoved}
    return average.finish().holding(kept)


def product_sums(
    state: ServerState, updates: Iterable[Update], weights: Weights, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, ProductSum], Mapping[str, Tensor]]:
    """Return the weighted means of the clients' products, by module path, and those of their whole tensors."""
    sums: defaultdict[str, ProductSum] = defaultdict(partial(ProductSum, dtype))
    extra = Average()
    for update in updates:
        check_modules(state, update)
        share, place = weight(update.measurements, weights), who(state, update)
        extra.add(Adapter(extra=update.adapter.extra), share, place)
        for name, pair in update.adapter.pairs.items():
            sums[name].add(pair, share, f"{place}, {name}")
    return sums, extra.finish().extra


def argument(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """Return a number of strategy_args; raise ConfigError with what was expected where it does not fit."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not fits(number):
        raise ConfigError(f"federation.strategy_args.{name}: found {value!r}, expected {expected}")
    return number


def parts_of(of: "Strategy") -> list[str]:
    """Return the names of the methods that a strategy is made of, the one that folds last."""
    return of.name.split(" + ")


def not_together(name: str, of: "Strategy", why: str) -> ConfigError:
    """Return the error of a method that cannot go around another one, with the reason."""
    return ConfigError(f"federation.strategy [{', '.join([name, *parts_of(of)])}]: {why}")


def accept_all(experiment: Experiment) -> None:
    """Refuse nothing."""


def as_it_is(state: ServerState) -> ServerState:
    """Return the state."""
    return state


def nothing(name: str) -> bool:
    """Keep nothing back."""
    return False


@dataclass(frozen=True, slots=True)
class Beside:
    """What an update brings beside the adapter, under one name."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    up_to: bool = False
    """Whether the first side may be shorter, down to 1"""


def no_more(handed: Assignment) -> Mapping[str, Beside]:
    """Expect the adapter alone."""
    return {}


def accept(handed: Assignment, update: Update) -> None:
    """Take every update of the right shape."""


class ServerStep(Protocol):
    """What the server does with the folded adapter, beside folding."""

    fingerprint: str
    """What tells the weights apart that its own model began with"""

    def __call__(self, state: ServerState) -> tuple[ServerState, Mapping[str, float]]:
        """Return the state that goes on, and figures for the journal. What must survive a restart is in its memory."""

    def measured(self, state: ServerState) -> Mapping[str, float]:
        """Return what the server's own model comes to on held-out rows, by measure."""

    def free(self) -> None:
        """Give up its models' memory: all rounds are over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One federated method, both halves."""

    name: str
    fold: Callable[[ServerState, Iterable[Update]], ServerState]
    """The server half: consume a round's updates one at a time, in client order, and return the next state."""
    assign: Callable[[ServerState, str, float], Assignment] = hand_out_global
    """What a client of this round is handed: (state, client, peak learning rate)."""
    local: LocalRule | None = None
    """The client half, beside the loss."""
    begin: Callable[[ServerState], ServerState] = as_it_is
    """What the method makes of the fresh adapter before round 1."""
    weights: Weights = "rows"
    """What clients weigh, for the methods around this one."""
    private: Callable[[str], bool] = nothing
    """Whether a tensor, by flat name, stays with its client: it is never sent, and each client goes on with its own."""
    beside: Callable[[Assignment], Mapping[str, torch.Size | Beside]] | None = None
    """What `Update.memory` holds after this assignment, by name, a shape alone being float32: an update that brings
    anything else is rejected. None: nothing where the local rule has no `finish`, else anything of a few times the
    adapter's size."""
    admit: Callable[[Assignment, Update], None] = accept
    """Raise AdapterMismatch for an update that has its shapes and cannot be folded all the same."""
    check: Callable[[Experiment], None] = accept_all
    """Raise ConfigError for an experiment that this method cannot run, with the reason."""
    mixed_ranks: bool = False
    """Whether clients may have different ranks. The global adapter has each module's largest, and `assign` cuts it."""
    averages: Literal["factors", "products"] = "factors"
    """What the fold takes means of. Server optimizers and control variates need factors that keep their coordinates
    from round to round."""
    pairs_only: bool = False
    """Whether it is about LoRA's A and B, so that adapter.method must be lora."""
    server: "Callable[[Parts], ServerStep] | None" = None
    """What the server itself trains after each fold, on rows of its own; made when the run's parts are ready."""
    check_server: Callable[[Experiment], None] = accept_all
    """Raise SheepfoldError where what it needs for that is not there: asked on the server alone."""
    foresee: "Callable[[Experiment], Foreseen] | None" = None
    """What that takes, from configurations alone."""
    beyond_peft: bool = False
    """Whether it trains something that plain PEFT has no layer for (cores, sparse deltas)."""
