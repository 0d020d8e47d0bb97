"""The processes of a shared run that work for the first one: they load what it loads, and do what it asks.

They write nothing but what clients keep, and print nothing: what goes wrong here is the first process's to say. Where
that one ends, they end.
"""

import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from sheepfold.adapter import Adapter
from sheepfold.assembly import AnyEngine, Parts, assemble
from sheepfold.config import GenerationSettings, TrainSettings, build
from sheepfold.devices import group
from sheepfold.devices.place import facts, take_threads
from sheepfold.devices.team import Gone, Team, named
from sheepfold.engines.common import Work
from sheepfold.engines.lockstep import LockstepEngine
from sheepfold.errors import CheckpointError, SheepfoldError
from sheepfold.journal import RunFolder
from sheepfold.local.store import ClientStore
from sheepfold.memory import is_out_of_memory
from sheepfold.messages import Assignment
from sheepfold.state import BatchPlan

GRACE_S = 1.0
"""Between the first process's end and this one's, so that torchrun hears of that one first and lets it finish."""


def serve() -> int:
    """Work for the first process until its run ends; return the exit code, which is not 0 where it did not end well."""
    take_threads()
    with group.joined() as talking:
        worker = Worker(Team(talking))
        try:
            worker.work()
        except Gone:
            time.sleep(GRACE_S)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            worker.close()
    return 0


class Worker:
    """One process, with the parts of the run once they are loaded."""

    def __init__(self, team: Team) -> None:
        """Take the team that it belongs to."""
        self.team = team
        self.parts: Parts | None = None
        self.halved: list[str] = []

    def work(self) -> None:
        """Answer to all that the first process asks, until it says that the run has ended. Raises Gone without it."""
        doing: dict[str, Any] = {
            "load": self.load, "begin": self.begin, "train": self.train, "score": self.score, "generate": self.generate,
        }  # fmt: skip
        while True:
            kind, asked = self.team.receive(0)
            if kind == "end":
                return
            try:
                self._tell(doing[kind](*asked))
            except Gone:
                raise
            except Exception as error:  # the first process raises it, and this one hears no more
                if not isinstance(error, SheepfoldError) and not is_out_of_memory(error):
                    traceback.print_exc(file=sys.stderr)
                self.team.send(0, ("failed", named(error)))
            if kind == "begin" and isinstance(self.engine, LockstepEngine):
                self._in_lockstep(self.engine)
                return

    def _in_lockstep(self, engine: LockstepEngine) -> None:
        """Train each client together with all others, until the first process closes its engine."""
        try:
            engine.serve()
        except RuntimeError as error:
            if group.is_lost(error):
                raise Gone(str(error)) from None
            raise

    def close(self) -> None:
        """Give the parts back."""
        if self.parts is not None:
            self.parts.engine.close()

    def load(self, experiment: str, emulator: str | None) -> Iterator[Any]:
        """Load the run's parts, with the base on this process's device; answers what must be the same everywhere."""
        given = (lambda: Path(emulator)) if emulator is not None else None
        self.parts = assemble(build(yaml.safe_load(experiment)), emulator=given, works=True)
        self.engine.halvings.tell = self.halved.append
        yield facts(self.parts)

    def begin(self, folder: str, plan: BatchPlan) -> Iterator[Any]:
        """Begin a run, or go on with one: what its clients keep is in its folder."""
        run = RunFolder(Path(folder))
        if not (run.path / "experiment.yaml").is_file():
            raise CheckpointError(f"{folder}: not to be seen from here; set output to a folder that all machines see")
        self.engine.store = ClientStore(run.clients)
        self.engine.plan = plan
        yield from ()

    def train(self, assignments: list[Assignment], plan: BatchPlan, alone: TrainSettings | None) -> Iterator[Any]:
        """Train these clients to their end, so that nobody waits for another's fold half-way; then answer each."""
        self.engine.plan = plan
        engine = self.engine if alone is None else self.engine.plain(train=alone)
        answers = list(engine.train(assignments))
        while answers:
            yield answers.pop(0)

    def score(self, adapters: list[Adapter], work: Work, rows: int, plan: BatchPlan) -> Iterator[Any]:
        """Answer what rows come to."""
        self.engine.plan = plan
        yield self.engine.scores(adapters, work, rows)

    def generate(
        self, adapters: list[Adapter], work: Work, settings: GenerationSettings, pad_id: int, eos: list[int]
    ) -> Iterator[Any]:
        """Answer what is generated for rows."""
        yield self.engine.generate(adapters, work, settings, pad_id, eos)

    @property
    def engine(self) -> AnyEngine:
        """The engine of this process."""
        assert self.parts is not None, "load comes first"
        return self.parts.engine

    def _tell(self, answers: Iterable[Any]) -> None:
        self.halved.clear()
        for answer in answers:
            self.team.send(0, ("answer", answer))
        self.team.send(0, ("done", (self.engine.plan, list(self.halved))))
