"""Where a run's clients are. The loop (simulation.py) asks them to train, to judge and to close, and does not know."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sheepfold.assembly import Parts, Site
from sheepfold.closing import close_here
from sheepfold.config import Experiment
from sheepfold.evaluation.held_out import HeldOut
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.judging import evaluate
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.state import ServerState
from sheepfold.wire.ends import terms
from sheepfold.wire.exams import ClientFacts
from sheepfold.wire.link import Link

Listener = Callable[[str, Mapping[str, Any]], None]
"""Is told what happens: (event, facts). Events: stage, start, round, progress, halved, waiting, closing,
benchmarks, benchmarks_failed, end."""


def silent(event: str, facts: Mapping[str, Any]) -> None:
    """Tell nobody."""


class Clients(Protocol):
    """All clients of a run."""

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield what each client returns, in the order of the assignments."""

    def judge(self, state: ServerState) -> HeldOut:
        """Return what all held-out rows say of a state; who did not answer is in `absent`."""

    def close(self, state: ServerState) -> Closing | None:
        """Let every client end the run, and return the closing table; None where none was asked for."""

    def facts(self) -> Mapping[str, ClientFacts]:
        """Return what clients told of rows that are not here, as far as they were heard."""


class Place(Protocol):
    """Where clients' rows are."""

    def site(self, experiment: Experiment) -> Site | None:
        """Return what of a run is on this machine; None: all of it. Raises ConfigError for what cannot run there."""

    def ready(self, experiment: Experiment, emulator: Callable[[], Path]) -> None:
        """Hear that all of a run is there but its base's weights, and in a folder the emulator of a closed one."""

    def clients(self, parts: Parts, folder: RunFolder, listener: Listener) -> Clients:
        """Return the clients of a run that is about to begin, or to go on."""


class Here:
    """Clients of this process, behind a wire that is not there."""

    def __init__(self, parts: Parts, folder: RunFolder, listener: Listener = silent) -> None:
        """Take a run's parts and folder."""
        self.parts, self.folder, self.listener = parts, folder, listener
        self.link = Link(parts.engine, terms(parts.experiment, parts.strategy))

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """See Clients."""
        return self.link.train(assignments)

    def judge(self, state: ServerState) -> HeldOut:
        """See Clients; of a closed model, the first judge's that offsite.evaluate names."""
        judges = [self.parts] if self.parts.closed is None else self.parts.closed.judges(self.parts)
        return evaluate(judges[0], state)

    def close(self, state: ServerState) -> Closing | None:
        """See Clients."""
        return close_here(self.parts, self.folder, state, self.listener)

    def facts(self) -> Mapping[str, ClientFacts]:
        """See Clients: data.json has it all."""
        return {}


class InProcess:
    """Everything in this process."""

    def site(self, experiment: Experiment) -> Site | None:
        """Return None: all rows are here."""
        return None

    def ready(self, experiment: Experiment, emulator: Callable[[], Path]) -> None:
        """Nobody else waits for it."""

    def clients(self, parts: Parts, folder: RunFolder, listener: Listener) -> Here:
        """Return them."""
        return Here(parts, folder, listener)
