"""Finding compilers and interpreters, the folders they read, and the room they get."""

import functools
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sheepfold.errors import ConfigError
from sheepfold.evaluation.code import runner
from sheepfold.evaluation.code.limits import Limits

Fields = Mapping[str, str]
"""A problem's fields, as published."""


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} not found on this machine; install it, or leave its language out")
    return found


@functools.cache
def home(program: str) -> tuple[str, ...]:
    """Return the folders that a program outside the system's folders needs to read: where it was installed."""
    if program == sys.executable:
        return runner.python_folders()
    place = Path(program).resolve()
    return () if program.startswith("./") else runner.installed(place.parents[1])


def build_limits(limits: Limits) -> Limits:
    """Compilers are not what is being judged: time and room enough for them, still bounded."""
    return replace(limits, timeout_s=60 + limits.timeout_s, cpu_s=60, memory_mib=2048, file_mib=64, folder_mib=256)


def before_last_braces(test: str, braces: int, code: str) -> str:
    """Insert code before the last so many closing braces of a test: at the end of its main function."""
    place = len(test)
    for _ in range(braces):
        place = test.rindex("}", 0, place)
    return f"{test[:place]}{code}\n{test[place:]}"
