"""Client machines in this process: real workers with rows in files of their own, reached by bytes alone."""

import json
from pathlib import Path
from typing import Any

from sheepfold.assets import corpus
from sheepfold.config import Experiment
from sheepfold.network.charter import Charter
from sheepfold.network.far import FarClients
from sheepfold.network.machines import Machines
from sheepfold.node.policy import Policy
from sheepfold.node.worker import Worker
from tests import runs
from tests.far.scripted import Clock, Life, Scripted
from tests.node.nodes import node

ROWS = {"ann": 24, "bob": 17, "cleo": 30, "dora": 20}
GIVES = Policy(methods=("lora", "ia3"), generation=True, full_weights=True)


def experiment(folder: Path, clients: int = 3, **over: Any) -> Experiment:
    """Return a small run of these clients, one in a pass; their rows are written to a file each."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    rows = iter(corpus.rows(sum(ROWS.values()), seed=3))
    for name, count in list(ROWS.items())[:clients]:
        text = "".join(json.dumps(next(rows)) + "\n" for _ in range(count))
        (folder / "rows" / f"{name}.jsonl").write_text(text)
    own = {"data.source": str(folder / "rows"), "data.partition": {"by": "files"}, "data.rows": None}
    return runs.experiment(folder, **({"train.clients_per_pass": 1} | own | over))


class Fleet:
    """All machines of an experiment's clients, and the place that reaches them through a scripted transport."""

    def __init__(self, folder: Path, lives: dict[str, Life] | None = None) -> None:
        names = sorted(path.stem for path in (folder / "rows").iterdir())
        self.workers = {n: Worker(node(folder, n, policy=GIVES), say=lambda text: None) for n in names}
        self.lives = {name: (lives or {}).get(name, Life()) for name in names}
        self.clock = Clock(until=1e6)
        self.charters: list[Charter] = []
        self.dies_after: int | None = None
        """Answers that the server receives, after which it dies"""

    def place(self, resume: bool = False, strangers: tuple[str, ...] = ()) -> "Place":
        return Place(self, Machines(self.carrier, [*reversed(self.workers), *strangers], resume=resume))

    def carrier(self, charter: Charter) -> Scripted:
        self.charters.append(charter)
        text = charter.as_json()

        def reply(client: str, kind: str, blob: bytes) -> bytes:
            if self.dies_after is not None:
                self.dies_after -= 1
                if self.dies_after < 0:
                    self.dies_after = None
                    raise ServerDies
            return self.workers[client].answer(text, kind, blob)

        return Scripted(self.clock, self.lives, reply)


class ServerDies(BaseException):
    """As sudden as can be in one process."""


class Place:
    """Machines, with the fleet's clock."""

    def __init__(self, fleet: Fleet, machines: Machines) -> None:
        self.fleet, self.machines, self.site, self.ready = fleet, machines, machines.site, machines.ready

    def clients(self, parts: Any, folder: Any, listener: Any) -> FarClients:
        far = self.machines.clients(parts, folder, listener)
        far._clock, far._sleep = self.fleet.clock, self.fleet.clock.sleep
        return far
