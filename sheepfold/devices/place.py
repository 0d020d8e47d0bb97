"""A run that several processes share, as torchrun started them: the first one's side.

    torchrun --nproc-per-node 2 -m sheepfold run experiment.yaml

The first process runs the loop, as it would alone; the others (worker.py) serve its engine. They get the experiment
from it, load the same parts at the same time, each with the base on its own device, and then wait for work.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sheepfold import simulation
from sheepfold.assembly import Parts, Site
from sheepfold.clients import Here, Listener, silent
from sheepfold.config import Experiment, dump
from sheepfold.devices import group
from sheepfold.devices.engine import SharedEngine
from sheepfold.devices.team import Team
from sheepfold.engines.lockstep import LockstepEngine
from sheepfold.errors import ConfigError
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.state import ServerState


class SharedHere(Here):
    """Clients of this process and of those that share its work."""

    def __init__(self, parts: Parts, folder: RunFolder, listener: Listener, team: Team) -> None:
        """Take a run's parts and folder, and those who work for it."""
        engine: Any = SharedEngine(parts.engine, team)
        super().__init__(replace(parts, engine=engine), folder, listener)
        self._team = team

    def close(self, state: ServerState) -> Closing | None:
        """See Clients; whoever worked for this run may go then."""
        closing = super().close(state)
        for worker in self._team.workers:
            self._team.ask(worker, "end")
        return closing


class Shared:
    """Everything on this machine, or on machines that see one file system, in several processes."""

    def __init__(self, team: Team) -> None:
        """Take those who work for this process."""
        self._team = team

    def site(self, experiment: Experiment) -> Site | None:
        """Return None: all rows are here."""
        return None

    def ready(self, experiment: Experiment, emulator: Callable[[], Path]) -> None:
        """Let the others load the run's parts: rows are tokenised by now, and an emulator is there."""
        given = str(emulator()) if experiment.offsite is not None else None
        for worker in self._team.workers:
            self._team.ask(worker, "load", (dump(experiment), given))

    def clients(self, parts: Parts, folder: RunFolder, listener: Listener) -> Here:
        """Return the clients, when all processes have loaded the same. Raises ConfigError where they have not.

        Under train.sharding the engine itself is all processes', which train each client together.
        """
        own = facts(parts)
        for worker in self._team.workers:
            [theirs] = self._team.answers(worker)
            for what, found in theirs.items():
                if found != own[what]:
                    raise ConfigError(
                        f"process {worker} of {group.world()} has another {what} than process 0: give all machines "
                        "the same files"
                    )
            self._team.ask(worker, "begin", (str(folder.path.resolve()), parts.engine.plan))
            list(self._team.answers(worker))
        if isinstance(parts.engine, LockstepEngine):
            return Here(parts, folder, listener)
        return SharedHere(parts, folder, listener, self._team)


def facts(parts: Parts) -> dict[str, str]:
    """Return what must be the same in all processes."""
    return {"data": parts.data.fingerprint, "base": parts.base.fingerprint}


def run(
    experiment: Experiment, *, resume: bool = False, resume_from: int | None = None, listener: Listener = silent
) -> simulation.Outcome:
    """Run an experiment in all processes that torchrun started, and return what it came to; in the first one alone.

    The others call `worker.serve`. See `simulation.run`, whose result this is to rounding, and whose errors it raises.
    """
    take_threads()
    try:
        with group.joined() as talking:
            place = Shared(Team(talking))
            return simulation.run(experiment, resume=resume, resume_from=resume_from, listener=listener, place=place)
    except RuntimeError as error:
        if group.is_lost(error):
            raise group.lost() from None
        raise


def take_threads() -> None:
    """Compute on this process's share of the machine's cores, where torchrun would have it take one.

    torchrun sets OMP_NUM_THREADS to 1 where nobody did. Another number is taken to be somebody's choice.
    """
    if group.under_torchrun() and group.threads_asked() == 1:
        torch.set_num_threads(max(1, group.cores() // group.local_world()))
