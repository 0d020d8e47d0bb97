"""Processes that are kept alive: restarted with a growing pause, gone when their supervisor is, however it ends.

Each child leads a process group, so that Ctrl-C reaches the supervisor alone, and a child takes its own children along.
Start children from the main thread: Linux ties a child's life to the thread that made it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0
STEADY_S = 60.0
"""Seconds of life after which a child's next end counts as its first"""
GRACE_S = 8.0
"""Seconds between asking a child to end and ending it"""
LARGEST_LOG = 16 * 2**20
"""Bytes of a log, after which it becomes <name>.log.1"""
PR_SET_PDEATHSIG = 1
LEAN = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""For processes that pass large pieces on: glibc gives their memory back at once, and does not keep some for each
thread. A SuperLink with 3 clients of 100 MB peaks at 0.85 GB instead of 1.34. Not for what computes."""


@dataclass(kw_only=True)
class Child:
    """One process to keep alive."""

    name: str
    command: Callable[[], Sequence[str]]
    """Made anew for each start, since what a child is told may have changed"""
    log: Path
    environment: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    """Open files that it gets, such as a bound socket"""
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    returncode: int | None = None
    """Of its last end"""
    _started: float = field(default=0.0, repr=False)
    _pause: float = field(default=FIRST_PAUSE_S, repr=False)
    _next: float = field(default=0.0, repr=False)

    @property
    def pid(self) -> int | None:
        """Its number, None while it does not run."""
        return self.process.pid if self.process is not None else None

    def start(self) -> None:
        """Start it. Raises OSError where there is no such program."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                list(self.command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                pass_fds=self.pass_fds,
                start_new_session=True,
                preexec_fn=(lambda: _die_with(parent)) if sys.platform == "linux" else None,
            )
        self.starts += 1
        self._started = time.monotonic()

    def step(self, say: Callable[[str], None]) -> None:
        """Look after it: note its end, start it again when its pause is over, turn a long log over."""
        now = time.monotonic()
        if self.process is not None:
            ended = self.process.poll()
            if ended is None:
                _turn_over(self.log)
                return
            self._ended(ended, now, say)
        if now >= self._next:
            self.start()

    def stop(self) -> None:
        """End it and its own children: asked first, made to after GRACE_S."""
        self.ask()
        self.wait()

    def ask(self) -> None:
        """Ask it to end."""
        if self.process is not None:
            _signal(self.process.pid, signal.SIGTERM)

    def wait(self, seconds: float = GRACE_S) -> None:
        """Wait for its end; make it end after these seconds."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        _signal(self.process.pid, signal.SIGKILL)  # the group: its own children too
        self.returncode = self.process.wait()
        self.process = None

    def restart(self) -> None:
        """End it and start it at once, as after a change of what it read at its start."""
        self.stop()
        self.start()

    def _ended(self, code: int, now: float, say: Callable[[str], None]) -> None:
        assert self.process is not None
        _signal(self.process.pid, signal.SIGKILL)  # what it started itself must not live on beside its next life
        self.process, self.returncode = None, code
        if now - self._started > STEADY_S:
            self._pause = FIRST_PAUSE_S
        say(f"{self.name} ended ({_how(code)}); starts again in {self._pause:g} s, its log is {self.log}")
        self._next = now + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE_S)


def stop_all(children: Sequence[Child]) -> None:
    """End children, the last one first, all within about GRACE_S."""
    until = time.monotonic() + GRACE_S
    for child in reversed(children):
        child.ask()
    for child in reversed(children):
        child.wait(max(0.1, until - time.monotonic()))


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a Flower process: this Python's programs first, nothing sent home, nothing installed.

    home: Flower's own folder for settings (FLWR_HOME); more: further variables.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "SHEEPFOLD_FOLD"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {
        "PATH": programs,
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **more,
    }


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends; runs in the child before it becomes its program."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _turn_over(log: Path) -> None:
    """Keep a log and one before it; the child goes on writing at the new end, since it appends."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LARGEST_LOG:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)
