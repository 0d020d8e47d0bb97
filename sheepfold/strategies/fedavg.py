"""FedAvg on adapters, and FedIT, which is the same fold with AdamW clients.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = w_k / sum_j w_j

Sources: FedAvg, arXiv:1602.05629, Algorithm 1; FedIT, arXiv:2305.05644, section 3.2.
"""

from collections.abc import Iterable
from dataclasses import replace

from sheepfold.adapter import Average
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.messages import Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, weight, who


def fedavg(weights: Weights = "rows") -> Strategy:
    """Return FedAvg over the factors of equal-rank adapters, folded as updates arrive."""

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        average = Average()
        for update in updates:
            average.add(update.adapter, weight(update.measurements, weights), who(state, update))
        return state.advance(average.finish())

    return Strategy(name="fedavg", fold=fold, weights=weights)


def fedit(weights: Weights = "rows") -> Strategy:
    """Return FedIT: FedAvg with AdamW clients."""
    return replace(fedavg(weights), name="fedit", check=_adamw_clients)


def _adamw_clients(experiment: Experiment) -> None:
    if experiment.train.optimizer.lower() != "adamw":
        raise ConfigError(
            f"federation.strategy fedit: its clients use adamw, found train.optimizer {experiment.train.optimizer!r}; "
            "fedavg takes any optimizer"
        )
