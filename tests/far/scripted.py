"""Clients whose lives are written down, a clock that nobody waits for, and a transport between them and a server."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from sheepfold.network.transport import Lost

EVER = float("inf")


class Stuck(Exception):
    """The script's end was reached, and the round is still open."""


@dataclass
class Clock:
    """Time that passes when somebody sleeps."""

    now: float = 0.0
    until: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.until:
            raise Stuck


@dataclass(frozen=True)
class Life:
    """One client: how long it takes, and when it is gone."""

    takes: float = 1.0
    """To train"""
    slow: frozenset[int] = frozenset()
    """Which of its assignments, counted from 0, take it ten seconds more"""
    judging: float = 0.5
    """For everything else"""
    gone: tuple[tuple[float, float], ...] = ()
    """(from, to), apart and in order; it comes back in a new session"""
    told_lost: bool = False
    """Whether the transport says that a message died with its machine"""
    too_much: bool = False
    """Whether it answers with more than it may"""

    def session(self, at: float) -> int | None:
        if any(start <= at < end for start, end in self.gone):
            return None
        return sum(end <= at for _, end in self.gone)


@dataclass
class Letter:
    client: str
    sent: float
    session: int
    kind: str
    blob: bytes
    most_bytes: int
    takes: float


@dataclass
class Scripted:
    """Carries real bytes to clients that live as their script says; each answers what `reply` makes of its blob."""

    clock: Clock
    lives: Mapping[str, Life]
    reply: Callable[[str, str, bytes], bytes] = lambda client, kind, blob: b"from " + client.encode() + b" to " + blob
    letters: dict[str, Letter] = field(default_factory=dict)
    yielded: dict[str, float] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    looked: list[tuple[float, dict[str, str]]] = field(default_factory=list)

    def connected(self) -> Mapping[str, str]:
        found = {c: str(s) for c, life in self.lives.items() if (s := life.session(self.clock.now)) is not None}
        self.looked.append((self.clock.now, found))
        return found

    def send(self, client: str, kind: str, blob: bytes, most_bytes: int) -> str:
        session = self.lives[client].session(self.clock.now)
        assert session is not None, "a message to a client that is not there"
        ticket = f"ticket-{len(self.letters)}"
        life, before = self.lives[client], [x for x in self.letters.values() if (x.client, x.kind) == (client, kind)]
        takes = (life.takes + 10.0 * (len(before) in life.slow)) if kind == "train" else life.judging
        self.letters[ticket] = Letter(client, self.clock.now, session, kind, blob, most_bytes, takes)
        return ticket

    def arrived(self, tickets: Collection[str]) -> Iterator[tuple[str, bytes | Lost]]:
        for ticket in sorted(tickets, key=lambda t: self.due(self.letters[t])):
            letter = self.letters[ticket]
            if ticket in self.yielded or ticket in self.forgotten or self.due(letter) > self.clock.now:
                continue
            self.yielded[ticket] = self.clock.now
            life = self.lives[letter.client]
            if life.session(letter.sent + letter.takes) != letter.session:
                yield ticket, Lost("its machine died", again=True)
            elif life.too_much:
                yield ticket, Lost("too many bytes", again=False)
            else:
                yield ticket, self.reply(letter.client, letter.kind, letter.blob)

    def forget(self, tickets: Collection[str]) -> None:
        self.forgotten += tickets

    def due(self, letter: Letter) -> float:
        """Return when something comes for a message."""
        life, done = self.lives[letter.client], letter.sent + letter.takes
        death = min((start for start, _ in life.gone if start >= letter.sent), default=EVER)
        if death <= done:
            return death + 3.0 if life.told_lost else EVER
        return done
