"""Answers that a bad line swallowed: two of a node's calls mean something else the second time; they get the first one.

    pull-messages   Flower hands a message out once, and would say that there is nothing
    push-messages   tells which parts of an answer to send, and would say none: the first call's reply was read by then

A SuperNode repeats a call until it hears an answer, and calls for something else as soon as it has: so one that repeats
itself has not heard.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

ONCE = frozenset({"/v1/fleet/pull-messages", "/v1/fleet/push-messages"})
LARGEST = 2**20
"""Bytes of such a call; it holds the names of a message's parts, a few kB"""
ASIDE = "/v1/fleet/send-node-heartbeat"
"""Comes from a thread of its own, and says nothing of what arrived"""
Headers = Sequence[tuple[bytes, bytes]]
Call = tuple[str, bytes]
"""Path and body"""


@dataclass(frozen=True, slots=True)
class Given:
    """An answer, and to what."""

    call: Call
    headers: Headers
    body: bytes


class Redelivery:
    """What each client was told last, until it shows that it has heard."""

    def __init__(self) -> None:
        self._given: dict[str, Given] = {}

    def again(self, name: str, call: Call) -> Given | None:
        """Return what a client is to be told again; None where the SuperLink is to answer its call."""
        given = self._given.get(name)
        if given is not None and given.call == call:
            return given
        if call[0] != ASIDE:
            self._given.pop(name, None)
        return None

    async def kept(self, name: str, call: Call, headers: Headers, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass an answer on when it is whole, and keep it; that of a pull without a message is empty, and not kept."""
        body = b"".join([piece async for piece in pieces])
        if body:
            self._given[name] = Given(call, headers, body)
            yield body
