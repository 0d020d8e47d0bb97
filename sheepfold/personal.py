"""Adapters of a client's own: what stays with it, and what cannot go together. joining.py makes and judges them."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from sheepfold.adapter import Adapter, kind
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, nothing


def check_personal(experiment: Experiment, made: Strategy) -> None:
    """Raise ConfigError for adapters of clients' own that this strategy cannot give them."""
    personal = experiment.personal
    if personal.ditto and (made.averages == "products" or made.beyond_peft):
        raise ConfigError(
            f"personal.ditto with federation.strategy {made.name}: its factors change their coordinates from round to "
            "round, so nearness to them means nothing; use fedavg, fedex or another that averages factors"
        )
    if personal.ditto and made.private is not nothing:
        raise ConfigError(
            f"personal.ditto with federation.strategy {made.name} or personal.keep_local: a client would have two "
            "adapters of its own; choose one"
        )
    if personal.keep_local and made.beyond_peft:
        raise ConfigError(
            f"personal.keep_local with federation.strategy {made.name}: it trains something else than pairs in some "
            "rounds, which cannot stay behind; use another strategy"
        )


def check_patterns(experiment: Experiment, paths: Collection[str]) -> None:
    """Raise ConfigError for a keep_local pattern that keeps none of these modules."""
    for pattern in experiment.personal.keep_local:
        if not any(_matches(path, pattern) for path in paths):
            raise ConfigError(
                f"personal.keep_local {pattern!r}: matches no adapted module; they are called like {min(paths)}"
            )


def keeping_local(made: Strategy, experiment: Experiment) -> Strategy:
    """Return the strategy with what personal.keep_local names private too.

    A fresh adapter's pair is drawn from the seed, so it does not travel downwards either; a folder's does.
    """
    patterns = experiment.personal.keep_local
    if not patterns:
        return made

    def kept(name: str) -> bool:
        return any(_matches(name.rpartition("/")[0], pattern) for pattern in patterns) and kind(name) != "positions"

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        handed = made.assign(state, client, lr)
        known = frozenset(name for name in handed.adapter.tensors() if kept(name))
        return handed if experiment.adapter.start else replace(handed, known=handed.known | known)

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        folded, had = made.fold(state, updates), state.adapter.tensors()
        stays = {name: had[name] for name in folded.adapter.tensors() if kept(name)}  # what nobody sent is no news
        side = Adapter({path: pair for path, pair in folded.side.pairs.items() if not kept(f"{path}/A")})
        return replace(folded, adapter=folded.adapter.holding(stays), side=side)

    return replace(made, assign=assign, fold=fold, private=lambda name: made.private(name) or kept(name))


def _matches(path: str, pattern: str) -> bool:
    """Return whether a pattern names a module, or something that holds it: 'layers.3' names all of that layer."""
    return any(fnmatchcase(f".{path}.", f"*.{pattern}{rest}.") for rest in ("", ".*"))
