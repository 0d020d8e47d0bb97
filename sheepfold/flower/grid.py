"""Messages to clients and their answers, over Flower: a Transport whose clients are enrolled nodes.

Flower knows nodes by numbers and notices after a minute that one has died; nodes.json has our names for them, and the
heartbeats in seen/ tell within ten seconds.

A message, or its answer, may be lost where nobody notices, with a process that is killed before it wrote it down. So a
client that owes an answer and has long been idle is asked again; asked twice, it answers the same.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from sheepfold.flower.alive import GONE_S
from sheepfold.flower.fold import Fold, glance
from sheepfold.flower.mail import Mail, Mark
from sheepfold.flower.parcels import parcel
from sheepfold.flower.registry import nodes
from sheepfold.network.transport import Kind, Lost

LOOK_S = 0.4
"""Between two questions to Flower; callers may ask more often."""
IDLE_S = 30.0
"""Idle for so long, and for the time that its message takes over a slow line, a client has lost it."""
SLOW_LINE = 250_000
"""Bytes a second"""


@dataclass(frozen=True, slots=True)
class Owed:
    """An answer that is waited for."""

    client: str
    most_bytes: int
    since: float
    patience: float
    """Seconds that its client may be idle"""


class GridTransport:
    """Carries one run's messages (see network/transport.py)."""

    def __init__(self, mail: Mail, fold: Fold, charter: str, check: Callable[[], None] = lambda: None) -> None:
        """charter: what goes with every message, as JSON; check: called at each look, and may raise to end a wait."""
        self._mail, self._fold, self._charter, self._check = mail, fold, charter, check
        self._open: dict[str, Owed] = {}
        self._busy: dict[str, float] = {}
        self._found: dict[str, Mark | Lost] = {}
        self._unwanted: set[str] = set()
        self._there: Mapping[str, str] = {}
        self._looked = {"nodes": -LOOK_S, "answers": -LOOK_S}

    def connected(self) -> Mapping[str, str]:
        """Return the clients that were heard within ten seconds and that Flower has, each with its session."""
        self._check()
        if self._due("nodes"):
            online, known = self._mail.online(), nodes(self._fold)
            seen = {name: self._session(name) for name, node in known.items() if node.node_id in online}
            self._there = {name: session for name, session in seen.items() if session}
        return self._there

    def _session(self, name: str) -> str:
        """Return the session that a client was last heard in, "" where that is too long ago; note whether it works."""
        seen = glance(self._fold.seen / f"{name}.json")
        if seen is None or time.time() - seen["at"] >= GONE_S:
            return ""
        if seen["state"].get("phase") != "idle":
            self._busy[name] = time.monotonic()
        return str(seen["session"])

    def send(self, client: str, kind: Kind, blob: bytes, most_bytes: int) -> str:
        """Hand a message over and return its ticket; an answer of more than most_bytes is not read."""
        node = nodes(self._fold)[client].node_id
        ticket, taken = self._mail.push(node or 0, parcel(kind, self._charter, blob))
        self._open[ticket] = Owed(client, most_bytes, time.monotonic(), IDLE_S + len(blob) / SLOW_LINE)
        if not taken:
            self._found[ticket] = Lost("Flower did not take its message", again=True)
        return ticket

    def arrived(self, tickets: Collection[str]) -> Iterator[tuple[str, bytes | Lost]]:
        """Yield what has come for these tickets and was not yielded before, one in memory at a time; never waits."""
        self._check()
        if self._due("answers"):
            self._look()
        for ticket in [ticket for ticket in tickets if ticket in self._found]:
            found = self._found[ticket]
            answer = found if isinstance(found, Lost) else self._mail.read(found, self._open[ticket].most_bytes)
            if answer is not None:
                del self._found[ticket], self._open[ticket]
                yield ticket, answer

    def forget(self, tickets: Collection[str]) -> None:
        """Want nothing more for these tickets: what comes for them is dropped unread."""
        for ticket in tickets:
            if self._open.pop(ticket, None) is not None:
                self._unwanted.add(ticket)
                if isinstance(found := self._found.pop(ticket, None), Mark):
                    self._drop(ticket, found)

    def _look(self) -> None:
        """Ask Flower which messages have answers."""
        asked = (self._open.keys() - self._found.keys()) | self._unwanted
        if not asked:
            return
        for ticket, found in self._mail.look(asked):
            if ticket in self._open:
                self._found[ticket] = found
            else:
                self._drop(ticket, found)
        for ticket in [ticket for ticket in self._open if ticket not in self._found and self._is_lost(ticket)]:
            self._found[ticket] = Lost("its message was lost on the way", again=True)
            self._unwanted.add(ticket)  # should its answer come after all

    def _is_lost(self, ticket: str) -> bool:
        """Return whether a client that owes an answer has been idle for too long."""
        owed = self._open[ticket]
        idle_since = max(owed.since, self._busy.get(owed.client, 0.0))
        return owed.client in self._there and time.monotonic() - idle_since > owed.patience

    def _drop(self, ticket: str, found: Mark | Lost) -> None:
        self._unwanted.discard(ticket)
        if isinstance(found, Mark):
            self._mail.drop(found)

    def _due(self, what: str) -> bool:
        """Return whether it is time to ask Flower again."""
        now = time.monotonic()
        if now - self._looked[what] < LOOK_S:
            return False
        self._looked[what] = now
        return True
