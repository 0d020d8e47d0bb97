"""kill -9 of everything there is, while a run goes on: it ends with the bits that it would have had."""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sheepfold import simulation
from sheepfold.assembly import Parts
from sheepfold.clients import Here, InProcess, Listener
from sheepfold.journal import RunFolder
from sheepfold.messages import Absence, Assignment, Update
from tests.network.federation import THREE, Federation, below
from tests.network.servers import until
from tests.runs import experiment

pytestmark = pytest.mark.network

KILLS = 10
TARGETS = ("client", "SuperNode", "executor", "SuperLink", "proxy", "superexec", "coordinator", "server")


@dataclass(frozen=True)
class Without(InProcess):
    """Everything in this process, but for those clients whom a journal misses in its rounds."""

    absent: Mapping[int, Sequence[str]]
    """Rounds completed before -> who did not take part"""

    def clients(self, parts: Parts, folder: RunFolder, listener: Listener) -> Here:
        return Missing(parts, folder, self.absent)


class Missing(Here):
    def __init__(self, parts: Parts, folder: RunFolder, absent: Mapping[int, Sequence[str]]) -> None:
        super().__init__(parts, folder)
        self.absent = absent

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        gone = set(self.absent.get(assignments[0].round, ()))
        there = super().train([a for a in assignments if a.client not in gone])
        return (Absence(a.client, "as in the journal") if a.client in gone else next(there) for a in assignments)


def asked(folder: Path, rounds: int, steps: int, **over: Any) -> Any:
    options = {
        "train.clients_per_pass": 1, "train.steps": steps, "federation.rounds": rounds, "evaluation.every": 0,
        "data.rows": None, "data.partition": {"by": "files"}, "data.source": str(folder / "rows"),
    }  # fmt: skip
    return experiment(folder, **options, **over)


def doing(federation: Federation, name: str) -> str:
    seen = json.loads((federation.fold.seen / f"{name}.json").read_text())
    return str(seen["state"].get("doing", ""))


def strike(federation: Federation, target: str, rng: random.Random) -> None:
    """kill -9 one process; who has no supervisor of ours is started again, as systemd would."""
    name = rng.choice(list(THREE))
    server, client = federation.server.process, federation.clients[name]
    assert server is not None
    if target == "client":
        client.kill()
        client.wait()
        federation.join(name)
    elif target == "server":
        federation.server.kill()
        federation.server.start()
    else:
        owner, word = {
            "SuperNode": (client, "flower-supernode"),
            "executor": (client, "flower.executor"),
            "SuperLink": (server, "flower-superlink"),
            "proxy": (server, "flower.proxy"),
            "superexec": (server, "flower-superexec"),
            "coordinator": (server, "serverapp"),
        }[target]
        for process in below(owner, word):
            process.kill()


def test_a_run_survives_ten_kills_of_anything_and_ends_with_the_same_bits(federation: Federation) -> None:
    whole = asked(federation.folder, rounds=12, steps=60)
    rng = random.Random(7)
    targets = [*TARGETS, *rng.choices(TARGETS, k=KILLS - len(TARGETS))]
    rng.shuffle(targets)
    run = federation.run(whole.model_dump(mode="json"))
    for number, target in enumerate(targets):
        run.reach(number + 1)
        time.sleep(rng.uniform(0, 4))
        print(f"kill {number + 1}: {target}", flush=True)
        strike(federation, target, rng)
    lines = run.finish(900)
    assert all(line["absent"] == {} for line in lines[1:])
    assert lines[-1]["adapter"] == simulation.run(whole).state.hash()


def test_a_round_closes_without_a_client_that_died_and_it_is_back_later(federation: Federation) -> None:
    federation.there()
    rules = {"network.deadline": 60, "network.quorum": 0.6, "federation.strategy": "scaffold"}
    whole = asked(federation.folder, rounds=5, steps=400, **rules)
    run = federation.run(whole.model_dump(mode="json"))
    until(lambda: run.lines() and doing(federation, "bob").startswith("training"), 120, "bob to train")
    federation.clients["bob"].kill()
    federation.clients["bob"].wait()
    run.reach(1)
    federation.join("bob")
    lines = run.finish(600)
    assert list(lines[1]["absent"]) == ["bob"]
    assert "left" in lines[1]["absent"]["bob"]
    assert lines[1]["seconds"]["round"] < 60
    assert "bob" in lines[-1]["clients"]
    absent = {line["round"] - 1: list(line["absent"]) for line in lines[1:] if line["absent"]}
    assert lines[-1]["adapter"] == simulation.run(whole, place=Without(absent)).state.hash()
