"""FedAvg on adapters, and FedIT, which is the same fold with AdamW clients.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = w_k / sum_j w_j

Sources: FedAvg, arXiv:1602.05629, Algorithm 1; FedIT, arXiv:2305.05644, section 3.2.
"""

from collections.abc import Iterable
from typing import Literal

from sheepfold.adapter import Average
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.local.rules import LocalRule
from sheepfold.messages import Measurements, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy

Weights = Literal["rows", "target_tokens", "processed_rows", "uniform"]


def weight(measured: Measurements, weights: Weights) -> float:
    """Return a client's weight in the fold, before the weights are made to sum to 1."""
    if weights == "uniform":
        return 1.0
    return float(getattr(measured, weights))


def fedavg(weights: Weights = "rows", local: LocalRule | None = None) -> Strategy:
    """Return FedAvg over the factors of equal-rank adapters, folded as updates arrive."""

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        average = Average()
        for update in updates:
            who = f"round {state.round + 1}, client {update.client!r}"
            average.add(update.adapter, weight(update.measurements, weights), who)
        return state.advance(average.finish())

    return Strategy(name="fedavg", fold=fold, local=local)


def fedit(weights: Weights = "rows", local: LocalRule | None = None) -> Strategy:
    """Return FedIT: FedAvg with AdamW clients."""
    base = fedavg(weights, local)
    return Strategy(name="fedit", fold=base.fold, local=local, check=_adamw_clients)


def _adamw_clients(experiment: Experiment) -> None:
    if experiment.train.optimizer.lower() != "adamw":
        raise ConfigError(
            f"federation.strategy fedit: its clients use adamw, found train.optimizer {experiment.train.optimizer!r}; "
            "fedavg takes any optimizer"
        )
