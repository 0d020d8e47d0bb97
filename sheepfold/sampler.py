"""Who takes part in a round."""

from collections.abc import Sequence
from dataclasses import dataclass

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError
from sheepfold.rng import stream


@dataclass(frozen=True, slots=True)
class UniformSampler:
    """Draws `size` clients of all, without replacement, in client order; the draw is named by (seed, round)."""

    clients: Sequence[str]
    size: int
    seed: int

    def sample(self, round: int) -> list[str]:
        """Return the cohort of a round, counted from 0."""
        drawn = stream(self.seed, "cohort", round).choice(len(self.clients), size=self.size, replace=False)
        return [self.clients[i] for i in sorted(drawn)]


def sampler(federation: FederationSettings, clients: Sequence[str], seed: int) -> UniformSampler:
    """Return the sampler of an experiment: a number, a fraction (as max(int(fraction * n), 1)), or everybody.

    Raises ConfigError where more clients are asked for than there are.
    """
    size = len(clients)
    if federation.clients_per_round is not None:
        size = federation.clients_per_round
    elif federation.fraction is not None:
        size = max(int(federation.fraction * len(clients)), 1)
    if size > len(clients):
        raise ConfigError(f"federation.clients_per_round {size}: the data has {len(clients)} clients")
    return UniformSampler(clients, size, seed)
