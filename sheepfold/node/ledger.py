"""The ledger: a line for every message that left this machine, with a running total.

    {"at": "2026-11-21T17:05:02+00:00", "run": ..., "round": 3, "client": "ward-7", "what": "update", "bytes": 139264,
     "sha256": ..., "total": 417792}

Lines are only ever added, each on disk before its message is sent: a machine that dies may have noted a message that it
did not send, never the reverse. A last line that was cut short is dropped when the ledger is opened again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sheepfold.errors import CheckpointError

TAIL = 65536
"""Bytes at the end of a ledger that hold its last line."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One message that left."""

    at: str
    """ISO 8601, UTC"""
    run: str
    round: int
    """Counted from 1"""
    client: str
    what: str
    """update, absence"""
    bytes: int
    sha256: str
    """Of the message"""
    total: int
    """Bytes of all messages so far, this one included"""


class Ledger:
    """One machine's ledger."""

    def __init__(self, path: Path) -> None:
        """Open a ledger, or begin one. Raises CheckpointError where it cannot be read or goes on after a bad line."""
        self.path = path
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                file.truncate(_whole(file.seek(0, os.SEEK_END), path))
        self.total = self._last_total()

    def note(self, what: str, data: bytes, *, run: str, round: int, client: str) -> Entry:
        """Write down a message, on disk before this returns; the caller sends it afterwards."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        total = self.total + len(data)
        entry = Entry(at, run, round, client, what, len(data), hashlib.sha256(data).hexdigest(), total)
        with _told(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.total = total
        return entry

    def entries(self) -> Iterator[Entry]:
        """Yield every message that was noted, one line in memory at a time."""
        with _told(self.path), open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield self._entry(line, number)

    def _last_total(self) -> int:
        with _told(self.path), open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().splitlines()
        return self._entry(lines[-1].decode(errors="replace"), -1).total if lines else 0

    def _entry(self, line: str, number: int) -> Entry:
        try:
            return Entry(**json.loads(line))
        except (ValueError, TypeError):
            where = "its last line" if number < 0 else f"line {number}"
            raise CheckpointError(
                f"{self.path}: {where} is no entry; was it edited? Move it away to begin anew"
            ) from None


def _whole(size: int, path: Path) -> int:
    """Return how many bytes of a ledger are whole lines."""
    with open(path, "rb") as file:
        start = max(0, size - TAIL)
        file.seek(start)
        tail = file.read()
    return start + tail.rfind(b"\n") + 1


class _told:
    """Turn what a disk says no with into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Raise CheckpointError for an OSError."""
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{self.path}: cannot be kept ({error.strerror}); free some space or name another ledger"
            ) from None
