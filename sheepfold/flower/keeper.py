"""The jobs of a server: the oldest waiting one is started, a dead coordinator is started again, a stopped one is ended.

waiting ── start ──▶ running ── its coordinator says ──▶ done | failed | stopped
                        │  ▲
           the lock is free: StopRun, then start again, to resume
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sheepfold.errors import CheckpointError, SheepfoldError
from sheepfold.flower import jobs, launch
from sheepfold.flower.fold import Fold
from sheepfold.flower.superlink import Unreachable

TO_START_S = 120.0
"""Seconds that a coordinator may take until it is at work; what it imports is large"""
WITHOUT_PROGRESS = 5
"""Coordinators in a row that may die without a further round before the job has failed"""
TO_STOP_S = 60.0
"""Seconds that a coordinator has to stop in good order before Flower is told to end it"""


@dataclass(slots=True)
class Keeper:
    """Looks after the jobs of one fold, one at a time."""

    fold: Fold
    say: Callable[[str], None]
    once: Callable[[str], None]
    """As say, for what would be said at each look"""
    _started: float = 0.0
    """When this server last started a coordinator"""
    _asked: dict[str, float] = field(default_factory=dict)
    """Job -> when its end was asked for"""
    _dead: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Job -> rounds at its last coordinator's death, and how many died there"""

    def step(self) -> None:
        """Look at the jobs once. Raises Unreachable where the SuperLink is not there to be told."""
        for job in jobs.every(self.fold):
            try:
                over = self._look(job)
            except Unreachable:
                raise
            except CheckpointError as error:  # a damaged file stops its own job alone
                self.once(str(error))
                continue
            if not over:
                return  # the rest waits for this one

    def _look(self, job: jobs.Job) -> bool:
        """Do what a job needs now; returns whether it is over."""
        now = jobs.status(job)
        if now.over:
            return True
        if now.state == "running":
            self._watch(job, now)
        elif jobs.should_stop(job):
            self._end(job, "stopped", "stopped before it began")
        else:
            self._start(job, now)
        return jobs.status(job).over

    def _start(self, job: jobs.Job, now: jobs.Status) -> None:
        try:
            run = launch.start_run(self.fold, job)
        except Unreachable:
            raise
        except SheepfoldError as error:
            self._end(job, "failed", str(error))
            return
        self._started = time.monotonic()
        jobs.update(job, state="running", flower_run=run, pid=None, attempts=now.attempts + 1)
        self.say(f"{job.id}: started" + (f", attempt {now.attempts + 1}" if now.attempts else ""))

    def _watch(self, job: jobs.Job, now: jobs.Status) -> None:
        if jobs.is_worked_on(job):
            self._hurry(job, now)
            return
        now = jobs.status(job)  # it may have ended between the two looks
        if now.over:
            return
        if jobs.should_stop(job):
            self._stop_run(now)
            self._end(job, "stopped", "stopped")
        elif now.pid is None and self._is_starting(now):
            return
        elif self._gives_up(job, now):
            self._stop_run(now)
            why = f"{WITHOUT_PROGRESS} coordinators died in a row without a further round; {self._logs}"
            self._end(job, "failed", why)
        else:
            self.say(f"{job.id}: its coordinator died; another one resumes it")
            self._stop_run(now)
            self._start(job, now)

    def _hurry(self, job: jobs.Job, now: jobs.Status) -> None:
        """End a coordinator that was asked to stop and does not."""
        if not jobs.should_stop(job):
            return
        if time.monotonic() - self._asked.setdefault(job.id, time.monotonic()) > TO_STOP_S:
            self._stop_run(now)
            if now.pid is not None:  # of the process that has the lock, so it is nobody else's
                with contextlib.suppress(ProcessLookupError):
                    os.kill(now.pid, signal.SIGKILL)

    def _is_starting(self, now: jobs.Status) -> bool:
        """Return whether the coordinator that was started last may still come."""
        recent = self._started and time.monotonic() - self._started < TO_START_S
        return bool(recent) and now.flower_run is not None and not self._is_finished(now.flower_run)

    def _is_finished(self, run: int) -> bool:
        try:
            return launch.run_status(self.fold, run).startswith("finished")
        except Unreachable:
            raise
        except SheepfoldError:  # Flower does not know it: its database was moved away
            return True

    def _stop_run(self, now: jobs.Status) -> None:
        if now.flower_run is None:
            return
        try:
            launch.stop_run(self.fold, now.flower_run)
        except Unreachable:
            raise
        except SheepfoldError as error:  # Flower forgot it, or its database was moved away: then nothing runs either
            self.say(f"note: {error}")

    def _gives_up(self, job: jobs.Job, now: jobs.Status) -> bool:
        """Return whether coordinators die without getting anywhere."""
        rounds = rounds_done(now)
        before, times = self._dead.get(job.id, (-1, 0))
        times = times + 1 if rounds == before else 1
        self._dead[job.id] = (rounds, times)
        return times >= WITHOUT_PROGRESS

    def _end(self, job: jobs.Job, state: jobs.State, reason: str) -> None:
        jobs.update(job, state=state, reason=reason, pid=None)
        self.say(f"{job.id}: {state} ({reason})")

    @property
    def _logs(self) -> str:
        return f"see {self.fold.logs / 'superexec.log'}"


def rounds_done(now: jobs.Status) -> int:
    """Return how many lines a job's journal has."""
    if now.folder is None:
        return 0
    try:
        return (Path(now.folder) / "rounds.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
