"""The loop. A round samples a cohort, trains it, and folds what comes back into one adapter:

    state ── sampler ──▶ cohort ── strategy.assign ──▶ assignments ── engine.train ──▶ updates ── strategy.fold ──▶ next

`rounds` hands out each new state; evaluation, journal, checkpoints and early stopping are the body of the caller's
`for` (see simulation.py).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

from sheepfold.errors import TrainingError
from sheepfold.messages import Absence, Assignment, Measurements, Update
from sheepfold.metrics import Mean, merge
from sheepfold.state import ServerState
from sheepfold.strategies.base import ServerStep, Strategy
from sheepfold.wire.packing import sent_bytes


class Engine(Protocol):
    """One way to train the sampled clients, in process or far away: assignments go out, updates stream in."""

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield what each client returns, in the order of the assignments."""


class Sampler(Protocol):
    """One way to choose a cohort."""

    def sample(self, round: int) -> list[str]:
        """Return the clients of a round, counted from 0."""


@dataclass(slots=True)
class RoundReport:
    """What one round amounted to; it fills up while the updates are folded."""

    round: int
    """Counted from 1."""
    cohort: Sequence[str]
    lr: float
    clients: dict[str, Measurements] = field(default_factory=dict)
    absences: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    """Steps for which each client drew rows."""
    late: dict[str, str] = field(default_factory=dict)
    """What became of answers to rounds that had closed, by client."""
    counted: dict[str, int] = field(default_factory=dict)
    """Rounds completed after the one that each client's update answers: this one, or one before."""
    downlink_bytes: int = 0
    """Bytes of all messages to the cohort; see wire/packing.py."""
    uplink_bytes: int = 0
    """Bytes of all that came back, rejected or not."""
    server: Mapping[str, float] = field(default_factory=dict)
    """Figures of what the server trained itself."""
    server_seconds: float = 0.0
    """What that took, of the round's seconds."""
    seconds: float = 0.0

    @property
    def loss(self) -> Mean:
        """The clients' training loss, nats per target token, over all their tokens."""
        return merge(m.loss for m in self.clients.values())

    def note(self, answers: Iterable[Update | Absence]) -> Iterator[Update]:
        """Pass updates on to the fold, and write down what each client did."""
        for answer in answers:
            self.uplink_bytes += sent_bytes(answer)
            if answer.late is not None:
                became = answer.reason if isinstance(answer, Absence) else "counts here"
                self.late[answer.client] = f"its answer of round {answer.late + 1}: {became}"
            if isinstance(answer, Absence):
                if answer.late is None:
                    self.absences[answer.client] = answer.reason
                self.steps[answer.client] = self.steps.get(answer.client, 0) + answer.steps
                continue
            self.clients[answer.client] = answer.measurements
            self.steps[answer.client] = self.steps.get(answer.client, 0) + answer.measurements.steps
            self.counted[answer.client] = self.round if answer.late is None else answer.late + 1
            yield answer
        if not self.clients and len(self.cohort) > 1:
            raise TrainingError(f"round {self.round}: no client took a good step ({self.reasons()})")

    def reasons(self, most: int = 3) -> str:
        """Return why clients stayed away, the first few."""
        return "; ".join(f"{client}: {reason}" for client, reason in list(self.absences.items())[:most])


def rounds(
    state: ServerState,
    until: int,
    *,
    sampler: Sampler,
    strategy: Strategy,
    engine: Engine,
    lr: Callable[[int], float],
    server: ServerStep | None = None,
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Yield the state and the report of each further round, until `until` rounds are completed.

    lr gives the peak learning rate of a round, counted from 0; server: what the strategy's server trains after each
    fold. Raises TrainingError where none of several clients of a
    round took a single good step; the last state handed out is still good.
    """
    while state.round < until:
        began = time.perf_counter()
        cohort = sampler.sample(state.round)
        report = RoundReport(state.round + 1, cohort, lr(state.round))
        assignments = [strategy.assign(state, client, report.lr) for client in cohort]
        report.downlink_bytes = sum(map(sent_bytes, assignments))
        updates = report.note(engine.train(assignments))
        first = next(updates, None)
        # a cohort of one whose client stayed away: nothing to fold, and no reason to stop
        state = strategy.fold(state, chain([first], updates)) if first else state.advance(state.adapter)
        if not isinstance(state, ServerState):
            raise TrainingError(
                f"federation.strategy {strategy.name}: its fold returned a {type(state).__name__}, expected a "
                "ServerState; end it with `return state.advance(adapter)`"
            )
        if first and server is not None:
            folded = time.perf_counter()
            state, report.server = server(state)
            report.server_seconds = time.perf_counter() - folded
        drawn = {client: state.drawn.get(client, 0) + steps for client, steps in report.steps.items()}
        state = replace(state, drawn={**state.drawn, **drawn}, counted={**state.counted, **report.counted})
        report.seconds = time.perf_counter() - began
        yield state, report
