"""The process between us and a program: builds its surroundings, runs its commands, and outlives all of it.

    runner ── job (JSON, standard input) ──▶ guard ── namespaces where it can, then command after command (watch.py)
    runner ◀─ isolation, then outcome (JSON lines, a pipe) ── guard

Runs alone (`python -I -S`, standard library only), so that no thread, file or variable of the evaluation is inherited.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.evaluation.code import filters, namespaces, watch
from sheepfold.evaluation.code.limits import Limits
from sheepfold.evaluation.code.processes import LINUX


def main() -> None:
    """Read a job, run it, write the report."""
    job = json.load(sys.stdin)
    if LINUX:
        namespaces.die_with_parent()
    report = os.dup(1)  # closes on exec, so the program never has it
    place = private_place(job) if job["namespaces"] else plain_place(job)
    for name, text in job["files"].items():
        (place.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    with os.fdopen(report, "w") as out:
        # A line before the program starts, so that its ending us is told from our failing by ourselves.
        print(json.dumps(isolation(place)), file=out, flush=True)
        print(json.dumps(_run(job["steps"], place)), file=out)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the program runs, and as whom."""

    folder: Path
    private: bool  # in namespaces of its own
    user: watch.User


def private_place(job: dict[str, Any]) -> Place:
    """Return the program's folder in a private system, of which this process is then the first."""
    distinct = namespaces.enter(Path(job["folder"]), job["reads"], job["folder_mib"])
    folder = Path(namespaces.WORK)
    os.chown(folder, namespaces.PROGRAM_ID, namespaces.PROGRAM_ID)
    return Place(
        folder, True, watch.User(namespaces.PROGRAM_ID, alone=True, distinct=distinct, filtered=filters.works())
    )


def plain_place(job: dict[str, Any]) -> Place:
    """Return the folder on the machine itself; root's programs get an unused id where they can still be read."""
    folder = Path(job["folder"])
    if LINUX:
        namespaces.adopt_orphans()
    fresh = 0x7ABC0000 + os.getpid()
    programs = [step["command"][0] for step in job["steps"]]
    filtered = filters.works()
    if os.geteuid() != 0 or not _can_run(fresh, programs, folder):
        return Place(folder, False, watch.User(None, alone=False, distinct=False, filtered=filtered, sockets=False))
    os.chown(folder, fresh, fresh)
    return Place(folder, False, watch.User(fresh, alone=True, distinct=True, filtered=filtered, sockets=False))


def _can_run(user: int, programs: Sequence[str], folder: Path) -> bool:
    child = os.fork()
    if not child:
        try:
            watch.become(watch.User(user, alone=True, distinct=True, filtered=False))
            reachable = os.access(folder.parent, os.X_OK) and all(
                os.access(name, os.R_OK | os.X_OK) for name in programs
            )
            os._exit(0 if reachable else 1)
        except OSError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _run(steps: list[dict[str, Any]], place: Place) -> dict[str, Any]:
    """Run command after command until one fails; return the last one's outcome."""
    outcome: dict[str, Any] = {}
    for number, step in enumerate(steps):
        limits = Limits(**step["limits"])
        outcome = {"step": number, **watch.run(step["command"], step["stdin"], limits, place.folder, place.user)}
        if outcome["exit_code"] != 0 or outcome["killed"]:
            break
    return outcome


def isolation(place: Place) -> dict[str, Any]:
    """Return what is in force, as the fields of `Isolation`."""
    ways = "pid namespace" if place.private else "subreaper" if LINUX else "process group"
    return {
        "network": "namespace" if place.private else "filter" if place.user.filtered else "none",
        "processes": ways,
        "files": "private root" if place.private else "none",
        "user": "unused id" if place.user.distinct else "own",
        "limits": [*watch.in_force(place.user), *(["folder size"] if place.private else [])],
    }


if __name__ == "__main__":
    main()
