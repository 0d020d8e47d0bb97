"""What goes on beside a run: its lock, and a thread for each tracker, so that none can slow or stop the loop.

run ── listener ──┬── the terminal
                  └── "a line was written" ── thread ── follower ── tracker
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sheepfold.config import Experiment
from sheepfold.journal import RunFolder
from sheepfold.loading import first_line
from sheepfold.tracking.base import Follower, check_installed
from sheepfold.tracking.running import Status, running

Listener = Callable[[str, Mapping[str, Any]], None]
PATIENCE_S, HURRY_S = 120.0, 5.0
"""How long all trackers together may take to send what is left: at a run's end, and where it stops before that."""


@contextlib.contextmanager
def followed(experiment: Experiment, listener: Listener) -> Iterator[Listener]:
    """Yield a listener that also wakes the experiment's trackers; they are done, or given up, when the block ends.

    The run's folder is locked from its start to the end of the block, so that others see that it goes on. Raises
    ConfigError before anything else where a tracker's library is missing.
    """
    check_installed(experiment.trackers)
    threads = [_Thread(name, experiment.tracker_args.get(name, {})) for name in experiment.trackers]
    with contextlib.ExitStack() as open_:

        def told(event: str, facts: Mapping[str, Any]) -> None:
            if event == "start":
                open_.enter_context(running(Path(facts["folder"])))
            if event == "end" and threads:
                facts = {**facts, "failed_trackers": _finish(threads, "finished", PATIENCE_S)}
            listener(event, facts)
            for thread in threads:
                if event == "start":
                    thread.begin(RunFolder(Path(facts["folder"])))
                elif event in ("round", "closing"):
                    thread.wake()

        try:
            yield told
        except BaseException:  # Ctrl-C too: nobody waits long for a tracker that hangs
            _finish(threads, "failed", HURRY_S)
            raise
        _finish(threads, "finished", PATIENCE_S)


def _finish(threads: Sequence["_Thread"], status: Status, patience_s: float) -> dict[str, str]:
    """Tell every tracker how the run ended, wait for them together, and return what went wrong in which."""
    for thread in threads:
        thread.end(status)
    until = time.monotonic() + patience_s
    return {thread.name: problem for thread in threads if (problem := thread.wait(until, patience_s))}


class _Thread:
    """One tracker's own thread; what goes wrong in it is said once and kept for the run's end."""

    def __init__(self, name: str, arguments: Mapping[str, str]) -> None:
        self.name, self.arguments = name, arguments
        self.problem: str | None = None
        self._status: Status = "open"
        self._written = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, run: RunFolder) -> None:
        self._thread = threading.Thread(target=self._follow, args=(run,), name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._written.set()

    def end(self, status: Status) -> None:
        """Have the tracker send what is left, and say how the run ended."""
        if self._status == "open":
            self._status = status
        self.wake()

    def wait(self, until: float, patience_s: float) -> str | None:
        """Wait for the thread to end, until a time of the monotonic clock; return what went wrong."""
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                self._fail(f"did not send everything within {patience_s:.0f} s")
            self._thread = None
        return self.problem

    def _follow(self, run: RunFolder) -> None:
        try:
            with Follower(run, self.name, self.arguments) as follower:
                while follower.status == "open":
                    self._written.wait()
                    self._written.clear()
                    ended = self._status  # asked before reading: what was written until then is read
                    follower.catch_up()
                    follower.status = ended
        except Exception as error:  # whatever a tracker's library raises: the run is worth more than its log
            self._fail(first_line(error)[:200])

    def _fail(self, why: str) -> None:
        if self.problem is None:
            self.problem = why
            next_ = "the run goes on without it" if self._status == "open" else "`sheepfold track` sends the rest"
            sys.stderr.write(f"sheepfold: tracker {self.name}: {why}; {next_}\n")
