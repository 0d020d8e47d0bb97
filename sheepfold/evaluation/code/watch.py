"""One command under limits: start it, read its outputs, watch what it uses, and end it with everything it started.

The system's own limits (setrlimit) bind each process. Memory and number of all processes together are counted 20 times
a second, so they can be exceeded for that long. Wall-clock time is this process's own.
"""

import os
import resource
import selectors
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sheepfold.evaluation.code import filters, namespaces
from sheepfold.evaluation.code.limits import KIB, MIB, Killed, Limits
from sheepfold.evaluation.code.processes import LINUX, kill_all, over, tasks_of

TICK_S = 0.05
SEARCH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class User:
    """Whom a program runs as."""

    id: int | None  # None: as we do
    alone: bool  # no other process counts against this user's RLIMIT_NPROC
    distinct: bool  # an id that owns nothing else on the machine
    filtered: bool  # whether system calls can be refused
    sockets: bool = True  # whether it may ask for them


@dataclass(slots=True)
class Tail:
    """The end of a stream."""

    limit: int
    kept: bytearray = field(default_factory=bytearray)

    def add(self, chunk: bytes) -> None:
        self.kept += chunk
        if len(self.kept) > 2 * self.limit:
            del self.kept[: -self.limit]

    def text(self) -> str:
        return bytes(self.kept[-self.limit :]).decode(errors="replace")


@dataclass(slots=True)
class Running:
    """A started command."""

    pid: int
    outputs: dict[int, Tail]  # our ends of its standard output and error
    started: float
    status: int | None = None
    cpu_s: float = 0.0
    peak_mib: float = 0.0


def run(command: list[str], stdin: str, limits: Limits, folder: Path, user: User) -> dict[str, Any]:
    """Return the fields of `Outcome`, when nothing of the command is left."""
    running = _start(command, stdin, limits, folder, user)
    try:
        killed = _watch(running, limits)
    finally:
        _end_everything(running)
    code = running.status if running.status is not None else -signal.SIGKILL
    if killed is None and (code == -signal.SIGXCPU or (code == -signal.SIGKILL and running.cpu_s >= limits.cpu_s)):
        killed = "time"
    out, err = (tail.text() for tail in running.outputs.values())
    for descriptor in running.outputs:
        os.close(descriptor)
    return {
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "killed": killed,
        "seconds": round(time.monotonic() - running.started, 3),
        "peak_mib": round(running.peak_mib, 1),
        "stdout": out,
        "stderr": err,
    }


def _start(command: list[str], stdin: str, limits: Limits, folder: Path, user: User) -> Running:
    pipes = [os.pipe() for _ in range(3)]
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = pipes
    os.write(in_write, stdin.encode()[:4096])  # fits into the pipe, so this cannot wait
    os.close(in_write)
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _become_program(command, (in_read, out_write, err_write), limits, folder, user)
    for descriptor in (in_read, out_write, err_write):
        os.close(descriptor)
    for descriptor in (out_read, err_read):
        os.set_blocking(descriptor, False)
    tails = {descriptor: Tail(limits.output_kib * KIB) for descriptor in (out_read, err_read)}
    return Running(pid, tails, time.monotonic())


def _become_program(command: list[str], streams: tuple[int, ...], limits: Limits, folder: Path, user: User) -> None:
    """Never returns."""
    try:
        os.setsid()
        for target, source in enumerate(streams):
            os.dup2(source, target)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP) and number in signal.valid_signals():
                signal.signal(number, signal.SIG_DFL)
        become(user)
        os.chdir(folder)
        for name, value in _rlimits(limits, user).items():
            resource.setrlimit(name, value)
        path = os.pathsep.join([os.path.dirname(command[0]), SEARCH])
        if user.filtered:
            filters.refuse(sockets=not user.sockets)
        os.execve(command[0], command, environment(folder, path))
    except BaseException as error:
        os.write(2, f"{command[0]} could not be started: {error}\n".encode())
    os._exit(127)


def become(user: User) -> None:
    """Take the user's id for good, without groups or any way to gain privileges."""
    if user.distinct:
        os.setgroups([])
    if user.id is not None:
        os.setresgid(user.id, user.id, user.id)
        os.setresuid(user.id, user.id, user.id)
    if LINUX:
        namespaces.no_new_privileges()


def environment(folder: Path, path: str) -> dict[str, str]:
    """Return all that a program learns from its environment."""
    place = str(folder)
    # One thread each: several programs run side by side, and libraries start one thread per core of the machine.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    return {"PATH": path, "HOME": place, "TMPDIR": place, "LANG": "C.UTF-8", **threads}


def _rlimits(limits: Limits, user: User) -> dict[int, tuple[int, int]]:
    memory, files = limits.memory_mib * MIB, limits.file_mib * MIB
    bounds = {
        resource.RLIMIT_CPU: (limits.cpu_s, limits.cpu_s + 1),  # the second ends those who ignore SIGXCPU
        resource.RLIMIT_FSIZE: (files, files),
        resource.RLIMIT_NOFILE: (limits.open_files, limits.open_files),
        resource.RLIMIT_CORE: (0, 0),
    }
    if LINUX:
        bounds[resource.RLIMIT_DATA if limits.reserves_memory else resource.RLIMIT_AS] = (memory, memory)
        count = limits.processes + (0 if user.alone else tasks_of(os.geteuid()))
        bounds[resource.RLIMIT_NPROC] = (count, count)
    return bounds


def in_force(user: User) -> list[str]:
    """Return the names of the limits that this system applies."""
    names = ["wall clock", "processor time", "file size", "open files", "output"]
    if LINUX:
        names += ["memory of a process", "memory of all", "processes counted"]
        if user.alone or os.geteuid() != 0:  # RLIMIT_NPROC does not bind root
            names.append("processes")
    return [*names, "system calls"] if user.filtered else names


def _watch(running: Running, limits: Limits) -> Killed | None:
    """Read and count until the command's own process ends or has to be ended; return why."""
    deadline, next_count = running.started + limits.timeout_s, running.started
    with selectors.DefaultSelector() as streams:
        for descriptor in running.outputs:
            streams.register(descriptor, selectors.EVENT_READ)
        ending = os.pidfd_open(running.pid) if LINUX else None
        if ending is not None:
            streams.register(ending, selectors.EVENT_READ)
        try:
            while not _reap(running):
                for key, _ in streams.select(TICK_S if LINUX else TICK_S / 5):
                    if key.fd != ending and _read(key.fd, running.outputs[key.fd]) is False:
                        streams.unregister(key.fd)
                now = time.monotonic()
                if now > deadline:
                    return "time"
                if LINUX and now > next_count:
                    next_count = now + TICK_S
                    if exceeded := over(limits):
                        return exceeded
        finally:
            if ending is not None:
                os.close(ending)
    return None


def _read(descriptor: int, tail: Tail) -> bool | None:
    """Take one chunk of what is there; return whether the stream goes on, None where nothing is there yet."""
    try:
        chunk = os.read(descriptor, 64 * KIB)
    except BlockingIOError:
        return None
    tail.add(chunk)
    return bool(chunk)


def _reap(running: Running) -> bool:
    """Bury whatever has ended, adopted orphans included; return whether the command's own process has."""
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return running.status is not None
        if pid == running.pid:
            running.status = os.waitstatus_to_exitcode(status)
            running.cpu_s = used.ru_utime + used.ru_stime
            running.peak_mib = used.ru_maxrss * (KIB if LINUX else 1) / MIB


def _end_everything(running: Running) -> None:
    """Kill until there is nobody left to kill, then read what they had written."""
    while True:
        left = kill_all(running.pid)
        _reap(running)
        if not left:
            break
        time.sleep(0.001)
    for descriptor, tail in running.outputs.items():
        while _read(descriptor, tail):
            pass
