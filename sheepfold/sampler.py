"""Who takes part in a round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError
from sheepfold.rng import stream


@dataclass(frozen=True, slots=True)
class UniformSampler:
    """Draws clients of all, without replacement, in client order; the draw is named by (seed, round)."""

    clients: Sequence[str]
    size: int
    """Clients whose updates a round wants"""
    seed: int
    more: int = 0
    """Clients that are asked beyond these, since some may not answer"""

    def sample(self, round: int) -> list[str]:
        """Return the cohort of a round, counted from 0."""
        asked = self.size + self.more
        drawn = stream(self.seed, "cohort", round).choice(len(self.clients), size=asked, replace=False)
        return [self.clients[i] for i in sorted(drawn)]


def sampler(
    federation: FederationSettings, clients: Sequence[str], seed: int, over_selection: float = 0.0
) -> UniformSampler:
    """Return the sampler of an experiment: a number, a fraction (as max(int(fraction * n), 1)), or everybody.

    over_selection: share of further clients that are asked. Raises ConfigError where more clients are asked for than
    there are, or nobody is left to be asked further.
    """
    size = len(clients)
    if federation.clients_per_round is not None:
        size = federation.clients_per_round
    elif federation.fraction is not None:
        size = max(int(federation.fraction * len(clients)), 1)
    if size > len(clients):
        raise ConfigError(f"federation.clients_per_round {size}: the data has {len(clients)} clients")
    if over_selection and size == len(clients):
        raise ConfigError(
            f"network.over_selection {over_selection:g}: every round asks all {size} clients already; set "
            "federation.clients_per_round lower, or over_selection to 0"
        )
    asked = min(len(clients), math.ceil(size * (1 + over_selection) - 1e-9))
    return UniformSampler(clients, size, seed, asked - size)
