"""A server's folder: who it is, who may come, what runs.

fold/
  ca.crt ca.key server.crt server.key    sheepfold certs
  superexec.secret                       what keeps other users of this machine from taking tasks
  nodes.json                             who is enrolled: {name: {"key": public key, "node_id": of Flower}}
  superlink.db                           Flower's
  flower/                                Flower's own settings (FLWR_HOME)
  server.json                            where the running server is: {"pid", "address", "superlink"}
  server.lock                            locked while it runs
  seen/<name>.json                       when each client was last heard, and what it was doing:
                                         {"at": server's clock, "signed_at": its own, "session": str, "state": {...}}
  traffic.json                           bytes of Flower's messages: {name: {"up": int, "down": int}}
  jobs/<id>/                             one for each run asked for, oldest first by name
    job.json        {"experiment": {...}, "resume": bool, "run": 16 hex digits}
    status.json     {"state": "waiting" | "running" | "done" | "failed" | "stopped", "reason": str,
                     "flower_run": int | null, "pid": of the coordinator | null, "attempts": int,
                     "folder": the run's folder | null}
    events.jsonl    what the run's listener is told, one {"event": str, "facts": {...}} a line
    stop            is there when the run is to stop
    lock            locked while the job's status is written
    coordinator     locked while the job's coordinator is at work
  logs/<process>.log
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.folders import replace_file

DEFAULT = Path("fold")


@dataclass(frozen=True, slots=True)
class Fold:
    """Paths of a server's folder."""

    path: Path

    @property
    def ca(self) -> Path:
        """The certificate that every node needs."""
        return self.path / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """What signs certificates."""
        return self.path / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's own."""
        return self.path / "server.crt"

    @property
    def key(self) -> Path:
        """The server's own."""
        return self.path / "server.key"

    @property
    def secret(self) -> Path:
        """What Flower's executor on this machine shows its SuperLink."""
        return self.path / "superexec.secret"

    @property
    def nodes(self) -> Path:
        """Who is enrolled."""
        return self.path / "nodes.json"

    @property
    def removed(self) -> Path:
        """Keys that are never taken again."""
        return self.path / "removed.json"

    @property
    def database(self) -> Path:
        """Flower's."""
        return self.path / "superlink.db"

    @property
    def home(self) -> Path:
        """Flower's own settings."""
        return self.path / "flower"

    @property
    def server(self) -> Path:
        """Where the running server is."""
        return self.path / "server.json"

    @property
    def lock(self) -> Path:
        """Locked while a server runs."""
        return self.path / "server.lock"

    @property
    def seen(self) -> Path:
        """A file a client."""
        return self.path / "seen"

    @property
    def traffic(self) -> Path:
        """Bytes by client."""
        return self.path / "traffic.json"

    @property
    def jobs(self) -> Path:
        """A folder a run."""
        return self.path / "jobs"

    @property
    def logs(self) -> Path:
        """A file a process."""
        return self.path / "logs"

    def require(self) -> None:
        """Raise ConfigError where this is no server's folder."""
        if not self.ca.is_file() or not self.certificate.is_file():
            raise ConfigError(f"{self.path}: no server's folder; `sheepfold certs {self.path} --host NAME` makes one")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a file's object, None where there is no file. Raises CheckpointError for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); was it edited? Repair it, or move it away") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object; was it edited? Repair it, or move it away")
    return found


def glance(path: Path) -> dict[str, Any] | None:
    """Return a file's object, None where there is none: of a file that is replaced every few seconds, and that a power
    cut may leave empty."""
    try:
        return read_json(path)
    except CheckpointError:
        return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object, whole or not at all. Raises CheckpointError where the disk refuses."""
    try:
        replace_file(path, (json.dumps(value, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free some space, or its folder") from None


def stamp(path: Path) -> tuple[int, int]:
    """Return what differs once a file was replaced or written; (0, 0) where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)
