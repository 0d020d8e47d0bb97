"""What carries messages between a server and its clients: bytes go out, bytes come back, and some never do."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["train", "judge", "close"]
"""train: an assignment, answered by an update; judge: held-out rows, answered by scores; close: the run is over."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A message that will get no answer."""

    reason: str
    again: bool
    """Whether asking once more may help, since the client's machine died; False: it answered, with too much"""


class Transport(Protocol):
    """One way to carry messages. Clients go by our own stable names."""

    def connected(self) -> Mapping[str, str]:
        """Return the clients that are there now, each with its session; one that died and came back has another."""

    def send(self, client: str, kind: Kind, blob: bytes, most_bytes: int) -> str:
        """Hand a message over and return its ticket; an answer of more than most_bytes is not read."""

    def arrived(self, tickets: Collection[str]) -> Iterator[tuple[str, bytes | Lost]]:
        """Yield what has come for these tickets and was not yielded before, one in memory at a time; never waits."""

    def forget(self, tickets: Collection[str]) -> None:
        """Want nothing more for these tickets."""
