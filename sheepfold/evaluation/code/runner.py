"""A generated program in a separate process, under limits, without a network where the system allows it.

    run(Job(files, steps)) ── guard (a process of its own) ── namespaces, limits, the program ──▶ Outcome

After `run` nothing of the program is left: no process, no file. What was in force is part of the result (`Isolation`);
docs/code-evaluation.md says what that does and does not protect from.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import sheepfold
from sheepfold.errors import SheepfoldError
from sheepfold.evaluation.code.limits import Isolation, Job, Limits, Outcome, Step

GUARD = "import sys; sys.path.insert(0, sys.argv[1]); from sheepfold.evaluation.code.guard import main; main()"
SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib")


class RunnerError(SheepfoldError):
    """The guard of a program ended without a report."""


def run(job: Job, namespaces: bool = True) -> Outcome:
    """Return how the program ended, when nothing of it is left. Raises RunnerError where the guard itself fails.

    namespaces: use them where `isolation` found them; False leaves limits alone, as on systems without them.
    """
    known = isolation()
    found, outcome = _guarded(job, namespaces=namespaces and known.complete)
    why = known.why if namespaces else "namespaces were not asked for"
    return Outcome(**outcome, isolation=replace(found, why=why))


def run_all(jobs: Sequence[Job], workers: int = 1) -> list[Outcome]:
    """Return every program's outcome in the jobs' order; `workers` of them run at a time."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(run, jobs))


@functools.cache
def isolation() -> Isolation:
    """Return what this machine allows, found out once by running a program that does nothing."""
    job = Job({}, (Step((sys.executable, "-I", "-S", "-c", "pass"), Limits(timeout_s=30)),), python_folders())
    why = f"namespaces need Linux, this is {sys.platform}"
    if sys.platform == "linux":
        try:
            found, outcome = _guarded(job, namespaces=True)
            if outcome["exit_code"] == 0:
                return found
            why = f"a program in namespaces of its own could not start: {outcome['stderr'].strip()}"
        except RunnerError as error:
            why = str(error)
    return replace(_guarded(job, namespaces=False)[0], why=why)


def python_folders() -> tuple[str, ...]:
    """Return the folders that our own interpreter reads, where they are not the system's."""
    places = dict.fromkeys([sys.base_prefix, sys.prefix, sysconfig.get_paths()["stdlib"]])
    return tuple(folder for place in places for folder in installed(Path(place)))


def installed(prefix: Path) -> tuple[str, ...]:
    """Return what to show of a place that something is installed in: nothing of the system's, nothing private."""
    if f"{prefix}/".startswith(SYSTEM):
        return ()
    if prefix in (Path.home(), Path.home() / ".local", Path("/")):  # other things live there too
        return tuple(str(prefix / name) for name in ("bin", "lib"))
    return (str(prefix),)


def _guarded(job: Job, namespaces: bool) -> tuple[Isolation, dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="sheepfold-code-"))
    try:
        room = max(step.limits.folder_mib for step in job.steps)
        order = {**job.as_dict(), "folder": str(folder), "namespaces": namespaces, "folder_mib": room}
        out, err = _guard(json.dumps(order).encode(), 30 + sum(step.limits.timeout_s for step in job.steps))
    finally:
        _remove(folder)
    lines = out.splitlines()
    if not lines:
        said = err.decode(errors="replace").strip().splitlines()
        raise RunnerError(f"a generated program could not be set up: {said[-1] if said else 'its guard ended'}")
    found = json.loads(lines[0])
    outcome = json.loads(lines[1]) if len(lines) > 1 else {"step": 0, "exit_code": None, "killed": "guard"}
    return Isolation(**{**found, "limits": tuple(found["limits"])}), outcome


def _guard(order: bytes, patience_s: float) -> tuple[bytes, bytes]:
    """Run a guard; return its report, bounded by the limits on output, and its own errors."""
    root = str(Path(sheepfold.__file__).resolve().parents[1])
    # The environment is the guard's own too: nothing to inherit, nothing to find in /proc/1/environ.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", GUARD, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"LANG": "C.UTF-8"},
        cwd="/",
        start_new_session=True,
    ) as guard:
        try:
            return guard.communicate(order, timeout=patience_s)
        except BaseException as error:
            guard.kill()  # process 1 of the namespace dies with it, and everything in there with process 1
            if isinstance(error, subprocess.TimeoutExpired):
                return guard.communicate()[0], b"it gave no report in time"
            raise


def _remove(folder: Path) -> None:
    """Delete the folder, also where the program took its own rights to parts of it away."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)
