"""One round at the server's end of a transport: hand out, wait, ask again where a machine died, close, and say why not.

    letters.blob(client) ──▶ transport ──▶ ... ──▶ transport ──▶ (client, bytes or Silence), in the order of the clients

An answer goes on at once where its turn has come, and waits on disk where it has not: one blob is in memory at a time.
Where more clients were asked than are wanted, who counts is known when the round has closed, and all wait until then.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sheepfold.network.rules import Rules
from sheepfold.network.spool import Spool
from sheepfold.network.transport import Kind, Lost, Transport

STEP_S = 0.1
"""Between two looks at the transport."""
AGAIN_S = 5.0
"""Before a client is asked again whose message was lost, though the session seems to be the same."""
MOST_SENDS = 8
"""Times that one client is asked in one round: what kills its machine each time would do so for ever."""


class Letters(Protocol):
    """What goes to the clients of a round, and what counts of what they answer."""

    @property
    def kind(self) -> Kind:
        """Return what is asked of them."""

    def blob(self, client: str) -> bytes:
        """Return what a client is sent."""

    def most_bytes(self, client: str) -> int:
        """Return how many bytes its answer may have."""

    def counts(self, client: str, blob: bytes) -> bool:
        """Return whether an answer is of the kind that the round wants; asked where more were asked than wanted."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A client whose answer the round went on without, and why."""

    reason: str


@dataclass(slots=True)
class _Asked:
    """One client of the round."""

    place: int
    ticket: str | None = None
    """Of the message that an answer is expected to"""
    session: str | None = None
    """In which it was sent"""
    sends: int = 0
    again_at: float = 0.0
    """When it may be asked again in the same session"""
    left_at: float | None = None
    answered: bool = False
    silence: Silence | None = None
    """Why it is not waited for, though it has not answered"""

    @property
    def outstanding(self) -> bool:
        """Whether its answer may still come."""
        return not self.answered and self.silence is None


class Gathering:
    """One round."""

    def __init__(
        self,
        transport: Transport,
        letters: Letters,
        clients: Sequence[str],
        rules: Rules,
        spool: Spool,
        *,
        others: Mapping[str, Callable[[bytes | Lost], None]] | None = None,
        told: Callable[[int, list[str]], None] = lambda answered, outstanding: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """others: ticket of an earlier round -> what to do with what comes for it. told: is called with how many have
        answered and who has not, whenever that changes."""
        self.transport, self.letters, self.rules, self.spool = transport, letters, rules, spool
        self.others, self.told = dict(others or {}), told
        self.clock, self.sleep = clock, sleep
        self.left: dict[str, str] = {}
        """When the round is closed: tickets of clients that may still be at it -> client"""
        self._asked = {client: _Asked(place) for place, client in enumerate(clients)}
        self._tickets: dict[str, str] = {}
        self._began = clock()
        self._more = len(self._asked) > rules.wanted
        self._next = 0
        self._updates = 0
        self._said = -1

    def answers(self) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield what each client answered, or why there is nothing, in the order of the clients."""
        self._began = self.clock()
        try:
            while True:
                there = self.transport.connected()
                self._send(there)
                yield from self._arrived()
                if self._closed(there):
                    break
                self.sleep(STEP_S)
            yield from self._rest(there)
        finally:
            self._end()

    def _send(self, there: Mapping[str, str]) -> None:
        """Hand its message to everybody who is there and has none, one blob in memory at a time."""
        for client, one in self._outstanding():
            session = there.get(client)
            if session is None:
                one.left_at = self._seconds() if one.left_at is None else one.left_at
                continue
            one.left_at = None
            lost = one.ticket is None and self._seconds() >= one.again_at
            if session == one.session and not lost:
                continue
            if one.sends == MOST_SENDS:
                one.silence = Silence(f"its machine died {MOST_SENDS} times over this message")
                continue
            one.ticket = self.transport.send(
                client, self.letters.kind, self.letters.blob(client), self.letters.most_bytes(client)
            )
            one.session, one.sends = session, one.sends + 1
            self._tickets[one.ticket] = client

    def _arrived(self) -> Iterator[tuple[str, bytes | Silence]]:
        """Take in what has come; yield those whose turn it is."""
        for ticket, found in self.transport.arrived([*self._tickets, *self.others]):
            if ticket in self.others:
                self.others.pop(ticket)(found)
                continue
            client = self._tickets[ticket]
            one = self._asked[client]
            if isinstance(found, Lost):
                self._lost(one, ticket, found)
            elif one.outstanding and self._taken(client, one, found):
                if not self._more and one.place == self._next:
                    self._next += 1
                    yield client, found
                else:
                    self.spool.put(one.place, found)
            del found  # before the next one is read
        yield from self._in_turn()

    def _taken(self, client: str, one: _Asked, blob: bytes) -> bool:
        """Return whether an answer has a place in the round, and note what became of it."""
        if self._more and self.letters.counts(client, blob):
            if self._updates >= self.rules.wanted:
                one.silence = self._left_out()
                return False
            self._updates += 1
        one.answered = True
        return True

    def _lost(self, one: _Asked, ticket: str, lost: Lost) -> None:
        del self._tickets[ticket]
        if not one.outstanding or ticket != one.ticket:
            return  # it has answered, or was asked again since
        one.ticket = None
        if lost.again:
            one.again_at = self._seconds() + AGAIN_S
        else:
            one.silence = Silence(f"rejected: {lost.reason}")

    def _in_turn(self) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield those after the last one handed on, as far as the first that is outstanding."""
        for client, one in list(self._asked.items())[self._next :]:
            if self._more or one.outstanding:
                return
            yield self._handed_on(client, one)

    def _rest(self, there: Mapping[str, str]) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield what is left when the round is closed."""
        for client, one in self._outstanding():
            one.silence = self._why(one, client in there)
            self.left |= {ticket: client for ticket, whose in self._tickets.items() if whose == client}
        for client, one in list(self._asked.items())[self._next :]:
            yield self._handed_on(client, one)

    def _handed_on(self, client: str, one: _Asked) -> tuple[str, bytes | Silence]:
        self._next += 1
        return client, one.silence or self.spool.take(one.place)

    def _closed(self, there: Mapping[str, str]) -> bool:
        outstanding = [client for client, _ in self._outstanding()]
        answers = len(self._asked) - len(outstanding)
        if answers != self._said:
            self._said = answers
            self.told(answers, outstanding)
        return self.rules.close(
            updates=self._updates if self._more else answers,
            answers=answers,
            outstanding=len(outstanding),
            there=sum(client in there for client in outstanding),
            seconds=self._seconds(),
        )

    def _why(self, one: _Asked, there: bool) -> Silence:
        """Return why a client is missing from the round that is closing."""
        if not one.sends:
            return Silence("not connected")
        if not there:
            return Silence(f"left at {one.left_at or 0.0:.1f} s")
        if self._more and self._updates >= self.rules.wanted:
            return self._left_out()
        return Silence(f"no answer within {self._seconds():.0f} s")

    def _left_out(self) -> Silence:
        return Silence(f"left out: {self.rules.wanted} others had answered")

    def _outstanding(self) -> list[tuple[str, _Asked]]:
        return [(client, one) for client, one in self._asked.items() if one.outstanding]

    def _seconds(self) -> float:
        return self.clock() - self._began

    def _end(self) -> None:
        """Want nothing more, but from those in `left`, which the caller forgets."""
        self.transport.forget([ticket for ticket in self._tickets if ticket not in self.left])
        self.spool.clear()
