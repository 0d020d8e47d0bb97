"""Runs asked of a server: a folder each, written by both ends.

    waiting ──▶ running ──▶ done | failed | stopped
                  ▲  │ its coordinator died
                  └──┘

Whether a coordinator is at work is told by a lock that it holds, which the kernel drops however it ends.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sheepfold.errors import CheckpointError, ConfigError, suggest
from sheepfold.flower.fold import Fold, read_json, write_json
from sheepfold.locks import is_locked, locked, try_lock

State = Literal["waiting", "running", "done", "failed", "stopped"]
OVER = ("done", "failed", "stopped")
LOCK_S = 5.0
"""Seconds for which a coordinator waits for its lock: a server that looks holds it for a moment"""


@dataclass(frozen=True, slots=True)
class Job:
    """One run asked for."""

    folder: Path

    @property
    def id(self) -> str:
        """Its name; a later job's is later in the alphabet."""
        return self.folder.name

    @property
    def events(self) -> Path:
        """What the run's listener is told."""
        return self.folder / "events.jsonl"

    @property
    def coordinator(self) -> Path:
        """Locked while a coordinator is at work."""
        return self.folder / "coordinator"

    @property
    def stop(self) -> Path:
        """There when the run is to stop."""
        return self.folder / "stop"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job is to do."""

    experiment: Mapping[str, Any]
    """Every option"""
    resume: bool
    run: str
    """The run's name in its messages, 16 hex digits"""
    place: str = "."
    """The folder that its paths are taken from: where it was asked for"""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a job stands."""

    state: State = "waiting"
    reason: str = ""
    """Why it failed or stopped"""
    flower_run: int | None = None
    pid: int | None = None
    """Of the coordinator, for people"""
    attempts: int = 0
    """Times that a coordinator was started"""
    folder: str | None = None
    """The run's folder, once there is one"""

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in OVER


def submit(fold: Fold, experiment: Mapping[str, Any], *, resume: bool = False, run: str | None = None) -> Job:
    """Ask the fold's server for a run; it may be started later. Raises CheckpointError where the disk refuses."""
    fold.require()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(experiment.get("name", "run")))[:40]
    job = Job(fold.jobs / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{name}")
    asked = Asked(dict(experiment), resume, run or secrets.token_hex(8), str(Path.cwd()))
    write_json(job.folder / "job.json", asdict(asked))
    write_json(job.folder / "status.json", asdict(Status()))  # last: from here on it is a job
    return job


def every(fold: Fold) -> list[Job]:
    """Return the jobs, oldest first."""
    return [Job(path.parent) for path in sorted(fold.jobs.glob("*/status.json"))]


def find(fold: Fold, id: str) -> Job:
    """Return a job by its name. Raises ConfigError where there is none."""
    jobs = {job.id: job for job in every(fold)}
    if id not in jobs:
        raise ConfigError(f"{fold.jobs}: no job {id!r}; " + (suggest(id, jobs) if jobs else "there are none"))
    return jobs[id]


def asked(job: Job) -> Asked:
    """Return what a job is to do. Raises CheckpointError for a damaged file."""
    found = read_json(job.folder / "job.json")
    try:
        return Asked(**(found or {}))
    except TypeError:
        raise CheckpointError(f"{job.folder / 'job.json'}: no job; was it edited? Remove its folder") from None


def status(job: Job) -> Status:
    """Return where a job stands. Raises CheckpointError for a damaged file."""
    found = read_json(job.folder / "status.json")
    known = {field.name for field in fields(Status)}
    return Status(**{key: value for key, value in (found or {}).items() if key in known})


def update(job: Job, **changes: Any) -> Status:
    """Change some of a job's status, whoever else writes it; returns the new one."""
    with locked(job.folder / "lock"):
        new = replace(status(job), **changes)
        write_json(job.folder / "status.json", asdict(new))
    return new


@contextlib.contextmanager
def at_work(job: Job, flower_run: int) -> Iterator[None]:
    """Be the job's coordinator in the block, as Flower's run of this number.

    Raises CheckpointError where another process is, or the server has started another run since.
    """
    until = time.monotonic() + LOCK_S
    while (held := try_lock(job.coordinator)) is None:
        if time.monotonic() > until:
            raise CheckpointError(f"{job.id}: another coordinator is at work on it; let it, or stop the job")
        time.sleep(0.05)
    with held:
        if (now := status(job)).flower_run != flower_run or now.over:
            raise CheckpointError(f"{job.id}: Flower's run {flower_run} is no longer wanted; {now.flower_run} is")
        update(job, pid=os.getpid())
        yield


def is_worked_on(job: Job) -> bool:
    """Return whether a coordinator is at work."""
    return is_locked(job.coordinator)


def ask_to_stop(job: Job) -> None:
    """Ask for a run's end in good order. Raises ConfigError where it is over."""
    if (now := status(job)).over:
        raise ConfigError(f"{job.id}: is {now.state} already; there is nothing to stop")
    job.stop.touch()


def should_stop(job: Job) -> bool:
    """Return whether somebody asked for its end."""
    return job.stop.exists()
