"""Programs of the tests and how they are run: short limits, and a mark by which survivors are found."""

import sys
import time
import uuid
from pathlib import Path

import pytest

from sheepfold.evaluation.code import runner
from sheepfold.evaluation.code.limits import Job, Limits, Outcome, Step

SHORT = {"timeout_s": 8.0, "cpu_s": 1, "memory_mib": 256, "processes": 16}


def python(source: str, *, namespaces: bool = True, stdin: str = "", mark: str = "", **limits) -> Outcome:
    """Run a Python program under short limits."""
    step = Step((sys.executable, "-I", "-S", "-B", "program.py", mark), Limits(**{**SHORT, **limits}), stdin)
    return runner.run(Job({"program.py": source}, (step,), runner.python_folders()), namespaces)


def mark() -> str:
    """Return a word that no other process has on its command line."""
    return f"sheepfold-test-{uuid.uuid4().hex}"


def survivors(word: str) -> list[str]:
    """Return the processes of the whole machine that have the word on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in place.read_bytes():
                found.append(place.parent.name)
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float = 1.0) -> bool:
    """Return whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def private():
    """Skip where this machine has no namespaces for us; say why."""
    if not runner.isolation().complete:
        pytest.skip(f"no namespaces here: {runner.isolation().why}")
