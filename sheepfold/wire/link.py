"""An engine at the end of a wire that is not there: what clients start from is what would arrive, and so is what folds.

Nothing becomes bytes: the transforms and checks of a real wire run over the values, and the bytes are counted.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from sheepfold.local.store import ClientStore
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import Terms, reply


class NearEngine(Protocol):
    """An engine in this process."""

    store: ClientStore

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield what each client returns, in the order of the assignments."""


class Link:
    """The same engine, with everything between it and the server."""

    def __init__(self, engine: NearEngine, terms: Terms) -> None:
        """Put a wire before an engine."""
        self.engine = engine
        self.terms = terms

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield every client's update as it arrives, or why there is none, in the order of the assignments."""
        desk = Desk(assignments, self.terms)
        received = [desk.received(a.client) for a in assignments]
        for there, answer in zip(received, self.engine.train(received), strict=True):
            yield desk.admit(answer.client, reply(answer, there, self.terms, self.engine.store))
