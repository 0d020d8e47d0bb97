"""What `sheepfold status` shows: read from the fold's files alone, so it asks no process and disturbs none."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sheepfold.errors import SheepfoldError
from sheepfold.flower import alive, certs, jobs, registry
from sheepfold.flower.fold import Fold, glance, read_json
from sheepfold.journal import RunFolder
from sheepfold.locks import is_locked

LONGEST = 60
"""Signs of a client's own words that are shown"""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One client."""

    name: str
    seen_s_ago: float | None
    """None: never"""
    here: bool
    doing: str
    bytes_up: int
    """Of Flower's messages, from it"""
    bytes_down: int


@dataclass(frozen=True, slots=True)
class JobView:
    """One run."""

    id: str
    state: str
    reason: str
    round: int
    """Rounds finished"""
    rounds: int | None
    attempts: int
    folder: str | None
    last: dict[str, Any] | None
    """The journal's last line"""


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything."""

    running: bool
    address: str | None
    nodes: list[NodeView]
    jobs: list[JobView]
    certificates: list[certs.Certificate]


def look(fold: Fold) -> Overview:
    """Return how things stand. Raises ConfigError where this is no server's folder."""
    found = certs.read(fold)
    running = is_locked(fold.lock)
    said = read_json(fold.server) if running else None
    traffic = glance(fold.traffic) or {}
    nodes = [_node(fold, name, traffic.get(name, {})) for name in registry.nodes(fold)]
    return Overview(running, said["address"] if said else None, nodes, [_job(job) for job in jobs.every(fold)], found)


def as_dict(found: Overview) -> dict[str, Any]:
    """Return it for JSON."""
    certificates = [
        {"path": str(c.path), "until": c.until.isoformat(), "days": round(c.days, 2), "hosts": c.hosts}
        | {"fingerprint": c.fingerprint}
        for c in found.certificates
    ]
    return {**asdict(found), "certificates": certificates}


def show(found: Overview) -> None:
    """Print it for people."""
    from rich.markup import escape

    from sheepfold.display import size
    from sheepfold.terminal import console, table

    out = console()
    out.print(f"server: {'running on ' + str(found.address) if found.running else 'not running'}")
    view = table("clients", "name", "seen", "doing", "up", "down")
    for node in found.nodes:
        row = (node.name, _ago(node), _doing(node), size(node.bytes_up), size(node.bytes_down))
        view.add_row(*(escape(cell) for cell in row))
    out.print(view if found.nodes else "clients: none is enrolled")
    view = table("runs", "job", "state", "round", "said last")
    for job in found.jobs:
        view.add_row(*(escape(cell) for cell in (job.id, job.state, f"{job.round}/{job.rounds or '?'}", _last(job))))
    out.print(view if found.jobs else "runs: none")
    for certificate in found.certificates:
        line = certificate.warning()
        out.print(f"warning: {line}" if line else f"{certificate.path}: until {certificate.until:%Y-%m-%d}")


def _node(fold: Fold, name: str, counted: dict[str, int]) -> NodeView:
    said = glance(fold.seen / f"{name}.json")
    ago = None if said is None else max(0.0, time.time() - float(said["at"]))
    here = ago is not None and ago < alive.GONE_S
    doing = str((said or {}).get("state", {}).get("doing", "")) if here else ""
    plain = "".join(c for c in doing if c.isprintable())[:LONGEST]  # its own words, on our terminal
    return NodeView(name, ago, here, plain, counted.get("up", 0), counted.get("down", 0))


def _job(job: jobs.Job) -> JobView:
    try:
        now, wanted = jobs.status(job), jobs.asked(job).experiment
        lines = RunFolder(Path(now.folder)).lines() if now.folder else []
    except SheepfoldError as error:
        return JobView(job.id, "damaged", str(error), 0, None, 0, None, None)
    rounds = wanted.get("federation", {}).get("rounds")
    last = lines[-1] if lines else None
    done = int(last["round"]) if last else 0
    return JobView(job.id, now.state, now.reason, done, rounds, now.attempts, now.folder, last)


def _doing(node: NodeView) -> str:
    return node.doing if node.here or node.seen_s_ago is None else "gone"


def _ago(node: NodeView) -> str:
    if node.seen_s_ago is None:
        return "never"
    s = node.seen_s_ago
    return f"{s:.0f} s ago" if s < 120 else f"{s / 60:.0f} min ago" if s < 7200 else f"{s / 3600:.0f} h ago"


def _last(job: JobView) -> str:
    if job.reason or job.last is None:
        return job.reason
    absent = job.last.get("absent") or {}
    loss = job.last.get("train_loss")
    told = [f"train loss {loss:.3f}"] if isinstance(loss, float) else []
    return ", ".join([*told, *([f"absent: {', '.join(absent)}"] if absent else [])])
