"""What a coordinator's listener is told, as lines of a file, for whoever follows the run from another process."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sheepfold.clients import Listener
from sheepfold.joining import Closing
from sheepfold.journal import plain
from sheepfold.state import BatchPlan

VALUES = {"plan": BatchPlan, "closing": Closing}
"""Facts that are values of ours, and not of JSON"""
LEFT_OUT = ("progress",)
"""Events that are many and say little"""
LOOK_S = 0.2


def writer(path: Path) -> Listener:
    """Return a listener that adds a line to a file for each event."""

    def write(event: str, facts: Mapping[str, Any]) -> None:
        if event not in LEFT_OUT:
            told = {name: asdict(fact) if name in VALUES else fact for name, fact in facts.items()}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain({"event": event, "facts": told})) + "\n")

    return write


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a file as they come, until `ended` says so and all were yielded; there may be no file yet.

    A run that was resumed tells its start and its rounds again; these are left out.
    """
    told: set[object] = set()
    for line in _lines(path, ended):
        said = json.loads(line)
        event, facts = said["event"], said["facts"]
        once = (event, facts.get("round")) if event in ("start", "round") else None
        if once not in told:
            told |= {once} - {None}
            yield event, {name: VALUES[name](**fact) if name in VALUES else fact for name, fact in facts.items()}


def _from(path: Path, at: int) -> bytes:
    """Return a file from a place on; nothing where there is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(at)
            return file.read()
    except FileNotFoundError:
        return b""


def _lines(path: Path, ended: Callable[[], bool]) -> Iterator[str]:
    """Yield a growing file's lines, each when it is whole."""
    at = 0
    while True:
        over = ended()  # before the last look, so that nothing is missed
        text = _from(path, at)
        whole = text[: text.rfind(b"\n") + 1]
        at += len(whole)
        yield from whole.decode().splitlines()
        if over:
            return
        time.sleep(LOOK_S)
