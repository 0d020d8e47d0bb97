"""Answers that come after their round has closed: dropped, or moved to where the next round begins.

    counted in the next round:   start of that round + (what the client sent - what it was handed)

A client counts once in a fold: its own answer of the round goes before a late one. What is late counts after all that
is in time, in the order of the clients, so the sum does not depend on when it came.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sheepfold.adapter import Adapter
from sheepfold.messages import Absence, Update
from sheepfold.network.spool import Spool
from sheepfold.network.transport import Lost
from sheepfold.wire.desk import Desk


@dataclass(frozen=True, slots=True)
class Kept:
    """What it takes to count late answers."""

    desk: Desk
    """Of the round that has closed"""
    spool: Spool
    """Where they wait for the end of the next round"""


@dataclass(slots=True)
class Latecomers:
    """Those who were still at it when a round closed."""

    round: int
    """Rounds completed before it"""
    cohort: Sequence[str]
    tickets: Mapping[str, str]
    """ticket -> client"""
    kept: Kept | None = None
    """None: late answers are dropped"""
    came: dict[str, int] = field(default_factory=dict)
    """client -> bytes of what it sent"""

    def expected(self) -> dict[str, Callable[[bytes | Lost], None]]:
        """Return, by ticket, what to do with what comes."""
        return {ticket: partial(self._take_in, client) for ticket, client in self.tickets.items()}

    def answers(self, counted: Collection[str], start: Adapter) -> Iterator[Update | Absence]:
        """Yield what became of what came, in the order of the cohort.

        counted: clients whose own update of this round counts; start: where this round began.
        """
        for place, client in enumerate(self.cohort):
            if client not in self.came:
                continue
            if self.kept is None or client in counted:
                why = "it came too late and is dropped" if self.kept is None else "dropped, since its newer one counts"
                yield Absence(client, why, sent_bytes=self.came[client], late=self.round)
                continue
            taken = self.kept.desk.take(client, self.kept.spool.take(place))
            assert taken is not None, "a late answer of a client that was heard in time"
            if isinstance(taken, Update):
                handed = self.kept.desk.assignments[client].adapter
                taken = replace(taken, adapter=moved(taken, handed, start))
            yield replace(taken, late=self.round)

    def _take_in(self, client: str, found: bytes | Lost) -> None:
        if isinstance(found, Lost) or client in self.came:
            return
        self.came[client] = len(found)
        if self.kept is not None:
            self.kept.spool.put(self.cohort.index(client), found)


def moved(update: Update, handed: Adapter, start: Adapter) -> Adapter:
    """Return `start` changed by what an update changed of the adapter that its client was handed."""
    was, begins = handed.tensors(), start.tensors()
    return start.holding({name: begins[name] + (t - was[name]) for name, t in update.sent().items()})
