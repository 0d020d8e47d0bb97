"""A server's folder: who it is, who may come, what runs.

    fold/
      ca.crt ca.key server.crt server.key    sheepfold certs
      superexec.secret                       what keeps other users of this machine from taking tasks
      nodes.json                             who is enrolled: {name: {"key": public key, "node_id": of Flower}}
      superlink.db                           Flower's
      seen/<name>.json                       when each client was last heard, and what it was doing
      jobs/<id>/                             one for each run asked for, oldest first by name
        job.json        {"experiment": {...}, "resume": bool, "run": 16 hex digits}
        status.json     {"state": "waiting" | "running" | "done" | "failed" | "stopped", "reason": str,
                         "flower_run": int | null, "pid": of the coordinator | null, "attempts": int,
                         "folder": the run's folder | null}
        events.jsonl    what the run's listener is told, one {"event": str, "facts": {...}} a line
        stop            is there when the run is to stop
      logs/<process>.log
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fold:
    """Paths of a server's folder."""

    path: Path

    @property
    def nodes(self) -> Path:
        """Who is enrolled."""
        return self.path / "nodes.json"

    @property
    def seen(self) -> Path:
        """A file a client."""
        return self.path / "seen"

    @property
    def jobs(self) -> Path:
        """A folder a run."""
        return self.path / "jobs"

    @property
    def logs(self) -> Path:
        """A file a process."""
        return self.path / "logs"
