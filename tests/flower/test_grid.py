"""Tickets over Flower: what comes, what is lost where nobody notices, and what is asked again."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from sheepfold.flower import grid
from sheepfold.flower.fold import Fold, write_json
from sheepfold.flower.mail import Mark
from sheepfold.network.transport import Lost

CHARTER = "{}"


class Post:
    """Flower, as far as its mail goes, with one node; what is in `answers` has come."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.answers: dict[str, bytes] = {}
        self.dropped: list[str] = []

    def online(self) -> frozenset[int]:
        return frozenset({7})

    def push(self, node: int, record: Any) -> tuple[str, bool]:
        self.sent.append(node)
        return f"ticket-{len(self.sent)}", True

    def look(self, tickets: Collection[str]) -> Iterator[tuple[str, Mark]]:
        return iter([(t, Mark(t)) for t in list(tickets) if t in self.answers])  # type: ignore[arg-type]

    def read(self, mark: Mark, most_bytes: int) -> bytes:
        return self.answers.pop(str(mark.tree))

    def drop(self, mark: Mark) -> None:
        self.dropped.append(self.answers.pop(str(mark.tree)).decode())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(grid.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(grid.time, "time", lambda: now[0])
    return now


class Server:
    """A transport, with one client that is heard in a phase."""

    def __init__(self, folder: Path, clock: list[float]) -> None:
        self.fold, self.clock, self.post = Fold(folder), clock, Post()
        self.fold.seen.mkdir(parents=True)
        write_json(self.fold.nodes, {"ann": {"key": "k", "node_id": 7}})
        self.transport = grid.GridTransport(self.post, self.fold, CHARTER)  # type: ignore[arg-type]

    def wait(self, seconds: float, phase: str, *tickets: str) -> dict[str, bytes | Lost]:
        found: dict[str, bytes | Lost] = {}
        for _ in range(round(seconds / 2)):
            self.clock[0] += 2
            state = {"at": self.clock[0], "session": "s1", "state": {"phase": phase}}
            write_json(self.fold.seen / "ann.json", state)
            assert self.transport.connected() == {"ann": "s1"}
            found |= dict(self.transport.arrived(tickets))
        return found


def test_an_idle_client_that_owes_an_answer_has_lost_its_message(tmp_path: Path, clock: list[float]) -> None:
    server = Server(tmp_path, clock)
    server.wait(2, "idle")
    ticket = server.transport.send("ann", "train", b"x" * 10, 100)
    assert server.wait(grid.IDLE_S - 4, "idle", ticket) == {}
    assert server.wait(8, "idle", ticket) == {ticket: Lost("its message was lost on the way", again=True)}
    server.post.answers[ticket] = b"after all"
    assert server.wait(4, "idle", ticket) == {}
    assert server.post.dropped == ["after all"]


def test_a_client_at_work_is_waited_for(tmp_path: Path, clock: list[float]) -> None:
    server = Server(tmp_path, clock)
    ticket = server.transport.send("ann", "train", b"x" * 10, 100)
    assert server.wait(40 * grid.IDLE_S, "training", ticket) == {}
    assert server.wait(grid.IDLE_S - 4, "idle", ticket) == {}
    server.post.answers[ticket] = b"done"
    assert server.wait(2, "idle", ticket) == {ticket: b"done"}


def test_a_large_message_has_longer_to_come(tmp_path: Path, clock: list[float]) -> None:
    server = Server(tmp_path, clock)
    large = bytes(10 * grid.SLOW_LINE)
    ticket = server.transport.send("ann", "train", large, 100)
    assert server.wait(grid.IDLE_S + 6, "idle", ticket) == {}
    assert isinstance(server.wait(10, "idle", ticket)[ticket], Lost)
