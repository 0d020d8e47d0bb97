"""Whether a run is still going on: its process holds a lock, which the kernel drops however the process ends.

The file is there while the run goes on, and after a kill; a lock on it is there only while the run goes on.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sheepfold.errors import CheckpointError
from sheepfold.journal import RunFolder

FILE = ".running"
Status = Literal["open", "finished", "failed"]
"""Where a run stands: it goes on, it came to its end, or it stopped before that."""


@contextlib.contextmanager
def running(run: Path) -> Iterator[None]:
    """Hold the run's lock in the block. Raises CheckpointError where another process has it: it runs the same run."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(
            OSError
        ):  # a file system that has no locks stops no run: it then looks as if nobody ran
            file = held.enter_context(open(run / FILE, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{run}: another process is at this run; let it, or stop it") from None
            held.callback(_remove, run / FILE)
        yield


def status(run: Path) -> Status:
    """Return where a run stands, seen from the machine that runs it.

    A card is written at a run's end, and names the journal's last adapter: that holds in a copy too, as times do not.
    """
    if _locked(run / FILE):
        return "open"
    card, lines = run / "model_card.md", RunFolder(run).lines()
    told = card.read_text(encoding="utf-8") if card.is_file() else ""
    return "finished" if lines and lines[-1]["adapter"] in told else "failed"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # an unlocked file says as little as none
        path.unlink()


def _locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
