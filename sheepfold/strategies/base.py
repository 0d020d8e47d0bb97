"""What a strategy is: who is handed what, what clients minimise besides their loss, and how updates fold."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sheepfold.config import Experiment
from sheepfold.local.rules import LocalRule
from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState


def hand_out_global(state: ServerState, client: str, lr: float) -> Assignment:
    """Return the assignment most methods make: start from the global adapter."""
    return Assignment(client, state.round, state.adapter, lr, first_step=state.drawn.get(client, 0))


def accept_all(experiment: Experiment) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One federated method, both halves."""

    name: str
    fold: Callable[[ServerState, Iterable[Update]], ServerState]
    """The server half: consume a round's updates one at a time, in client order, and return the next state."""
    assign: Callable[[ServerState, str, float], Assignment] = hand_out_global
    """What a client of this round is handed: (state, client, peak learning rate)."""
    local: LocalRule | None = None
    """The client half: a penalty beside the loss."""
    check: Callable[[Experiment], None] = accept_all
    """Raise ConfigError for an experiment that this method cannot run, with the reason."""
