"""`sheepfold run --on flower`: a run is asked of this machine's server, and followed; it goes on without us."""

import sys
import time
from collections.abc import Callable

from sheepfold.clients import Listener
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError, TrainingError
from sheepfold.evaluation.benchmarks import after_run
from sheepfold.flower import jobs
from sheepfold.flower.events import follow
from sheepfold.flower.fold import Fold
from sheepfold.flower.registry import nodes
from sheepfold.journal import check_same, last_folder
from sheepfold.locks import is_locked
from sheepfold.network.site import site
from sheepfold.tracking.base import check_installed

PATIENCE_S = 1.0
"""Between two looks at whether the server is there"""
STOPPED = 130
"""Exit code of a run that somebody stopped, as after Ctrl-C"""


def run(experiment: Experiment, fold: Fold, *, resume: bool, listener: Listener) -> None:
    """Ask for a run and follow it to its end.

    Raises SheepfoldError for what cannot be, before anything is asked for, and TrainingError with the reason where the
    run has failed. Ctrl-C leaves it going.
    """
    before = [found.id for found in jobs.every(fold) if not jobs.status(found).over]
    job = ask(experiment, fold, resume=resume)
    if before and is_locked(fold.lock):  # said in a log too, where no stage is shown
        sys.stderr.write(f"sheepfold: {job.id} waits for {', '.join(before)}; a server runs one at a time\n")
    elif not is_locked(fold.lock):
        sys.stderr.write(f"sheepfold: no server is running; {job.id} waits for `sheepfold server --fold {fold.path}`\n")
    try:
        listener("stage", {"text": f"waiting for {job.id} to start"})
        for event, facts in follow(job.events, _over(job, fold, listener)):
            listener(event, facts)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"sheepfold: {job.id} goes on at the server; watch it with `sheepfold status --fold {fold.path}`, end it "
            f"with `sheepfold stop {job.id} --fold {fold.path}`\n"
        )
        sys.exit(STOPPED)
    ended = jobs.status(job)
    if ended.state == "failed":
        raise TrainingError(ended.reason)
    if ended.state == "stopped":
        sys.stderr.write(f"sheepfold: {job.id}: {ended.reason}\n")
        sys.exit(STOPPED)


def ask(experiment: Experiment, fold: Fold, *, resume: bool) -> jobs.Job:
    """Check what can be checked here, and ask the fold's server for a run. Raises SheepfoldError in one line."""
    fold.require()
    if not (enrolled := list(nodes(fold))):
        raise ConfigError(f"{fold.path}: nobody is enrolled; `sheepfold enroll PUBKEY --name NAME` enrols a client")
    check_installed(experiment.trackers)
    after_run.check(experiment)
    site(experiment, enrolled)
    if resume:
        check_same(last_folder(experiment), experiment)
    return jobs.submit(fold, experiment.model_dump(mode="json"), resume=resume)


def _over(job: jobs.Job, fold: Fold, listener: Listener) -> Callable[[], bool]:
    """Return what says whether a job is over; where its server is away, that is told."""
    looked, away = 0.0, False

    def over() -> bool:
        nonlocal looked, away
        if time.monotonic() - looked > PATIENCE_S:
            looked, gone = time.monotonic(), not is_locked(fold.lock)
            if gone and not away:
                listener("stage", {"text": f"no server is running: `sheepfold server --fold {fold.path}` goes on"})
            away = gone
        return jobs.status(job).over

    return over
