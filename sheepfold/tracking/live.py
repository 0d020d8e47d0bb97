"""Trackers beside a run: a thread for each follows the journal, so that none can slow or stop the loop.

run ── listener ──┬── the terminal
                  └── "a line was written" ── thread ── follower ── tracker
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sheepfold.config import Experiment
from sheepfold.journal import RunFolder
from sheepfold.loading import first_line
from sheepfold.tracking.base import Follower, check_installed

Listener = Callable[[str, Mapping[str, Any]], None]
PATIENCE_S = 120.0
"""How long the end of a run waits for a tracker to send what is left."""


@contextlib.contextmanager
def followed(experiment: Experiment, listener: Listener) -> Iterator[Listener]:
    """Yield a listener that also wakes the experiment's trackers; they are done, or given up, when the block ends.

    Raises ConfigError before anything else where a tracker's library is missing.
    """
    if not experiment.trackers:
        yield listener
        return
    check_installed(experiment.trackers)
    threads = {name: _Thread(name, experiment.tracker_args.get(name, {})) for name in experiment.trackers}

    def told(event: str, facts: Mapping[str, Any]) -> None:
        if event == "end":
            failed = {name: problem for name, thread in threads.items() if (problem := thread.finish())}
            facts = {**facts, "failed_trackers": failed}
        listener(event, facts)
        for thread in threads.values():
            if event == "start":
                thread.begin(RunFolder(Path(facts["folder"])))
            elif event in ("round", "closing"):
                thread.wake()

    try:
        yield told
    finally:
        for thread in threads.values():
            thread.finish()


class _Thread:
    """One tracker's own thread; what goes wrong in it is said once and kept for the run's end."""

    def __init__(self, name: str, arguments: Mapping[str, str]) -> None:
        self.name, self.arguments = name, arguments
        self.problem: str | None = None
        self._written, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, run: RunFolder) -> None:
        self._thread = threading.Thread(target=self._follow, args=(run,), name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._written.set()

    def finish(self) -> str | None:
        """Wait for the tracker to send what is left; return what went wrong."""
        if self._thread is None:
            return self.problem
        self._ended.set()
        self._written.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._fail(f"did not send everything within {PATIENCE_S:.0f} s")
        self._thread = None
        return self.problem

    def _follow(self, run: RunFolder) -> None:
        try:
            with Follower(run, self.name, self.arguments) as follower:
                while True:
                    self._written.wait()
                    self._written.clear()
                    last = self._ended.is_set()  # asked before reading: what was written until then is read
                    follower.catch_up()
                    if last:
                        return
        except Exception as error:  # whatever a tracker's library raises: the run is worth more than its log
            self._fail(first_line(error)[:200])

    def _fail(self, why: str) -> None:
        if self.problem is None:
            self.problem = why
            sys.stderr.write(f"sheepfold: tracker {self.name}: {why}; the run goes on without it\n")
