"""Finding, counting and killing whatever a program started: all of its namespace, all descendants, or one group."""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from sheepfold.evaluation.code.limits import MIB, Killed, Limits

LINUX = sys.platform == "linux"
PAGE = resource.getpagesize()


def over(limits: Limits) -> Killed | None:
    """Return which limit all processes of the program exceed together, if any (Linux)."""
    memory = count = 0
    for pid in descendants():
        try:
            memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
            count += 1
        except (OSError, IndexError):
            continue  # it ended since
    if count > limits.processes:  # first, since pages that processes share count once for each of them
        return "processes"
    return "memory" if memory > limits.memory_mib * MIB else None


def kill_all(leader: int) -> bool:
    """Send SIGKILL to every process of the program, whose first one leads a session; return whether there was any."""
    if not LINUX:  # those that made a session of their own cannot be found
        try:
            os.killpg(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    if os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True
    found = list(descendants())
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return bool(found)


def descendants() -> Iterator[int]:
    """Yield the processes that this one, and what it started, started (Linux); all others, where this is process 1."""
    me, children = os.getpid(), dict[int, list[int]]()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == me:
            continue
        if me == 1:
            yield int(name)
            continue
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes()
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(int(name))
    open_ends = [me]
    while open_ends:
        for child in children.get(open_ends.pop(), []):
            yield child
            open_ends.append(child)


def tasks_of(user: int) -> int:
    """Return how many processes and threads a user has (Linux)."""
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return total
