"""Lock files: which process is at something. The kernel drops a lock however its process ends."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sheepfold.errors import CheckpointError


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file in the block; waits for whoever has it. Raises CheckpointError where the disk refuses."""
    with _opened(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> IO[str] | None:
    """Return an open file that holds the lock until it is closed, None where another process has it."""
    file = _opened(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_locked(path: Path) -> bool:
    """Return whether a process holds a lock file."""
    if not path.exists():
        return False
    held = try_lock(path)
    if held is None:
        return True
    held.close()
    return False


def _opened(path: Path) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); is its folder yours?") from None
