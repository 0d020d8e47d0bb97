"""Client machines to test with: rows in files of their own, settings without a server behind them."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sheepfold.assets import corpus
from sheepfold.config import Experiment
from sheepfold.network.charter import Charter
from sheepfold.network.machines import Machines
from sheepfold.node.settings import NodeSettings
from sheepfold.node.worker import Worker
from sheepfold.simulation import Outcome
from tests import runs, small

RUN_ID = "0123456789abcdef"
ROWS = {"ann": 24, "bob": 17, "cleo": 30}


def folder_of_rows(folder: Path) -> Path:
    """Write each client's rows as a file of its own; return the folder."""
    rows = iter(corpus.rows(sum(ROWS.values()), seed=3))
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in ROWS.items():
        lines = [json.dumps(next(rows)) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def node(folder: Path, name: str, **over: Any) -> NodeSettings:
    """Return the settings of the machine of one of these clients, whose own folder is in `folder`."""
    values = {
        "name": name,
        "server": "localhost:1",
        "ca": "ca.crt",
        "key": "own.key",
        "data": str(folder / "rows" / f"{name}.jsonl"),
        "folder": folder / "nodes" / name,
        "device": "cpu",
    }
    return NodeSettings.model_validate({**values, **over})


class Wire:
    """A transport within this process: what is sent is answered at once, by the machine it is for."""

    def __init__(self, workers: Mapping[str, Worker], charter: Charter) -> None:
        self.workers, self.charter = workers, charter.as_json()
        self.sent: list[tuple[str, str, bytes]] = []
        self.given: list[tuple[str, bytes]] = []
        self.answers: dict[str, bytes] = {}
        self.before: Callable[[str, str, bytes], None] = lambda client, kind, blob: None

    def connected(self) -> dict[str, str]:
        return dict.fromkeys(self.workers, "once")

    def send(self, client: str, kind: str, blob: bytes, most_bytes: int) -> str:
        self.before(client, kind, blob)
        answer = self.workers[client].answer(self.charter, kind, blob)
        assert len(answer) <= most_bytes
        self.sent.append((client, kind, blob))
        self.given.append((client, answer))
        ticket = str(len(self.sent))
        self.answers[ticket] = answer
        return ticket

    def arrived(self, tickets: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for ticket in [ticket for ticket in tickets if ticket in self.answers]:
            yield ticket, self.answers.pop(ticket)

    def forget(self, tickets: Collection[str]) -> None:
        for ticket in tickets:
            self.answers.pop(ticket, None)


@dataclass
class Barn:
    """The machines of a few clients, each with a worker, and the server's place that reaches them."""

    folder: Path
    over: dict[str, dict[str, Any]] = field(default_factory=dict)
    """client -> what its settings have otherwise"""
    said: list[str] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folder_of_rows(self.folder / "rows")
        small.saved(self.folder / "base")
        for name in ROWS:
            self.restart(name)

    def restart(self, name: str) -> Worker:
        """Put a new worker into a machine's place, which knows what is on disk alone."""
        if name in self.workers:
            self.workers[name].close()
        self.workers[name] = Worker(node(self.folder, name, **self.over.get(name, {})), self.said.append)
        return self.workers[name]

    def place(self, resume: bool = False, run: str = RUN_ID) -> Machines:
        return Machines(self._carrier, list(ROWS), run, resume)

    def _carrier(self, charter: Charter) -> Wire:
        self.wires.append(Wire(self.workers, charter))
        return self.wires[-1]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def experiment(folder: Path, **over: Any) -> Experiment:
    """Return a run over these clients' rows, in one process or between machines; dotted keys in `over` replace."""
    rows = {"source": str(folder / "rows"), "max_tokens": 48, "partition": {"by": "files"}, "eval_share": 0.2}
    usual = {"data": rows, "model": {"base": str(folder / "base")}, "train.clients_per_pass": 1}
    return runs.experiment(folder, **(usual | over))


def lines(run: Outcome) -> list[dict[str, Any]]:
    """Return a run's journal."""
    return [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
