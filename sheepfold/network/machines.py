"""Where the clients of a run between machines are: the place for `simulation.run`, at the server.

    simulation.run(experiment, resume=resume, place=Machines(carrier, enrolled, run, resume))

The run's folder keeps who takes part and the name that all its messages bear (network.json), so that a run that goes on
after a crash is the same run to its clients, whoever was enrolled since.
"""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sheepfold
from sheepfold.assembly import Parts, Site
from sheepfold.clients import Listener
from sheepfold.config import Experiment
from sheepfold.data.sources import NAMED
from sheepfold.errors import CheckpointError
from sheepfold.journal import RunFolder, last_folder
from sheepfold.network.charter import Charter
from sheepfold.network.far import FarClients
from sheepfold.network.site import site
from sheepfold.network.transport import Transport

KEPT = "network.json"
OURS = ("output", "cache", "device", "trackers", "tracker_args", "card", "network")
"""Options that are the server's alone, so that nobody else is told."""


@dataclass(frozen=True, slots=True)
class Machines:
    """Clients on machines of their own."""

    carrier: Callable[[Charter], Transport]
    """What carries messages, each with this charter beside it"""
    enrolled: Sequence[str]
    """Names of the clients that may take part"""
    run: str | None = None
    """What a new run's messages bear, 16 hex digits; None: it is drawn"""
    resume: bool = False
    """Whether the run goes on from its newest folder"""

    def site(self, experiment: Experiment) -> Site:
        """Return the server's part of the run. Raises ConfigError and DataError for what cannot be between machines."""
        had = kept(last_folder(experiment)) if self.resume else None
        return site(experiment, had["clients"] if had else self.enrolled)

    def ready(self, experiment: Experiment, emulator: Callable[[], Path]) -> None:
        """Nobody waits for it: clients load what they need when they are asked."""

    def clients(self, parts: Parts, folder: RunFolder, listener: Listener) -> FarClients:
        """Return the clients of a run that is about to begin, or to go on."""
        run = (kept(folder) or {}).get("run") or self.run or secrets.token_hex(8)
        folder.write_json(KEPT, {"run": run, "clients": list(parts.clients)})
        return FarClients(parts, folder, self.carrier(charter(parts, run)), run, listener)


def charter(parts: Parts, run: str) -> Charter:
    """Return what every client is told of a run: its options, but for those that are the server's alone."""
    values = {key: value for key, value in parts.experiment.model_dump(mode="json").items() if key not in OURS}
    benchmarks = [key for key in values["evaluation"] if key.startswith(("task", "allow"))]
    values["evaluation"] = {k: v for k, v in values["evaluation"].items() if k not in benchmarks}
    values["data"] = _of_clients(values["data"]) | {"labels": list(parts.data.labels)}
    values["federation"]["strategy_args"] = _without_teacher(values["federation"]["strategy_args"])
    clients = tuple(parts.clients)
    return Charter(run, values, clients, parts.base.fingerprint, sheepfold.__version__)


def _of_clients(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data section without the server's own rows and places: clients take rows of their own."""
    public = {"source": "the server's"} if data["public"]["source"] else {}
    source = data["source"] if data["source"] in (*NAMED, "corpus") else "the clients'"
    ours = {"path": None, "test_split": None, "rows": None, "partition": {"by": "natural"}}
    return {**data, **ours, "source": source, "public": public}


def _without_teacher(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a strategy's arguments without the place of fedkd's teacher, which no client loads."""
    own = {name: _without_teacher(part) for name, part in arguments.items() if isinstance(part, dict)}
    return {**arguments, **own, **({"teacher": "the server's"} if "teacher" in arguments else {})}


def kept(folder: RunFolder) -> dict[str, Any] | None:
    """Return what a run's folder keeps of its network; None where it has none. Raises CheckpointError for damage."""
    path = folder.path / KEPT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fine = re.fullmatch("[0-9a-f]{16}", found["run"]) and all(isinstance(name, str) for name in found["clients"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore it, or start a new run") from None
    if not fine:
        raise CheckpointError(f"{path}: is no record of a run between machines; restore it, or start a new run")
    return dict(found)
