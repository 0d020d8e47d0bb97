"""Strategies: one method a file, both halves: what clients minimise, and how the server folds."""

from collections.abc import Callable, Mapping

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError
from sheepfold.local.rules import LocalRule
from sheepfold.plugins import resolve
from sheepfold.strategies.base import Strategy
from sheepfold.strategies.fedavg import fedavg, fedit

STRATEGIES: Mapping[str, Callable[..., Strategy]] = {"fedavg": fedavg, "fedit": fedit}


def strategy(settings: FederationSettings, local: LocalRule | None = None) -> Strategy:
    """Return the strategy of the settings, by name or `module:function`.

    It is called with `weights`, `local` and its own arguments. Raises ConfigError for unknown names and arguments.
    """
    arguments = {"weights": settings.weights, "local": local, **settings.strategy_args}
    made = resolve(STRATEGIES, settings.strategy, "federation.strategy", arguments)
    if not isinstance(made, Strategy):
        kind = type(made).__name__
        raise ConfigError(f"federation.strategy {settings.strategy}: returned a {kind}, expected a Strategy")
    return made
