"""One run's coordinator, the process that Flower starts for it: the same loop as in one process, with far clients.

    job.json ──▶ simulation.run(place=Machines) ──▶ the run's folder
                     ├── events.jsonl, for whoever follows
                     └── status.json

It may be killed at any moment: the server starts another one, which resumes from the last finished round.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheepfold import simulation
from sheepfold.clients import Listener
from sheepfold.config import Experiment, build
from sheepfold.errors import CheckpointError, SheepfoldError
from sheepfold.flower import jobs
from sheepfold.flower.events import writer
from sheepfold.flower.fold import Fold
from sheepfold.flower.grid import GridTransport
from sheepfold.flower.mail import Mail
from sheepfold.flower.registry import nodes
from sheepfold.journal import last_folder
from sheepfold.network.charter import Charter
from sheepfold.network.machines import Machines

if TYPE_CHECKING:
    from flwr.serverapp import Grid

FOLD = "SHEEPFOLD_FOLD"
"""The environment variable that names the server's folder"""


class Stopped(SheepfoldError):
    """Somebody asked for the run's end."""


def coordinate(grid: "Grid", told: str, flower_run: int) -> None:
    """Run a job to its end, and write down what came of it.

    told: JSON with the job's name. What Flower itself raises is left to the server, which starts
    another coordinator. Raises CheckpointError where another one is at work.
    """
    fold = Fold(Path(os.environ[FOLD]))
    job = jobs.find(fold, json.loads(told)["job"])
    with jobs.at_work(job, flower_run):
        state, reason = _outcome(grid, fold, job)
        jobs.update(job, state=state, reason=reason, pid=None)


def _outcome(grid: "Grid", fold: Fold, job: jobs.Job) -> tuple[jobs.State, str]:
    """Run, and return how it ended and why."""
    try:
        asked = jobs.asked(job)
        with contextlib.chdir(asked.place):
            _run(grid, fold, job, build(asked.experiment, source=str(job.folder / "job.json")))
    except Stopped as stopped:
        return "stopped", str(stopped)
    except SheepfoldError as error:
        return "failed", " ".join(str(error).split())
    return "done", ""


def _run(grid: "Grid", fold: Fold, job: jobs.Job, experiment: Experiment) -> None:
    asked, before = jobs.asked(job), jobs.status(job).folder
    resume = asked.resume or before is not None
    if before is not None and (newest := last_folder(experiment).path.resolve()) != Path(before):
        raise CheckpointError(f"{before}: {newest} is the newest run of its name now; resume that one, or rename it")

    def carrier(charter: Charter) -> GridTransport:
        return GridTransport(Mail.of(grid), fold, charter.as_json(), lambda: _check(job))

    place = Machines(carrier, list(nodes(fold)), asked.run, resume)
    simulation.run(experiment, resume=resume, listener=_listener(job), place=place)


def _listener(job: jobs.Job) -> Listener:
    """Return what writes a run's events down, notes its folder, and ends it between two of them where it should."""
    write = writer(job.events)

    def listen(event: str, facts: Mapping[str, Any]) -> None:
        if event == "start":
            jobs.update(job, folder=str(Path(facts["folder"]).resolve()))
        write(event, facts)
        if event != "end":
            _check(job)

    return listen


def _check(job: jobs.Job) -> None:
    """Raise Stopped where the run is to end."""
    if jobs.should_stop(job):
        raise Stopped("stopped; finished rounds are saved, go on with --resume")
