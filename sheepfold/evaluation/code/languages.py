"""The languages of HumanEval-X: how a program is put together, built and run, and which tools that takes.

Every program ends by repeating what it reads from its standard input, a token drawn for the run, right after the last
test. Ending early, by whatever exit code, is therefore not passing.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from sheepfold.errors import ConfigError, suggest
from sheepfold.evaluation.code.compiled import (
    cpp_files,
    cpp_missing,
    cpp_steps,
    java_files,
    java_steps,
    rust_files,
    rust_missing,
    rust_steps,
)
from sheepfold.evaluation.code.cutting import GO_STOP, PYTHON_STOP, RUST_STOP
from sheepfold.evaluation.code.golang import go_files, go_reads, go_steps
from sheepfold.evaluation.code.interpreted import js_files, js_steps, python_files, python_steps
from sheepfold.evaluation.code.limits import Job, Limits, Step
from sheepfold.evaluation.code.tools import Fields, home


@dataclass(frozen=True, slots=True)
class Language:
    """One language of HumanEval-X."""

    name: str
    title: str  # as the language line before a prompt has it
    comment: str
    tools: tuple[str, ...]
    stop: tuple[str, ...]  # what ends an answer while it is generated
    files: Callable[[Fields, str], dict[str, str]]  # problem and answer -> files
    steps: Callable[[Limits, str], tuple[Step, ...]]
    reads: Callable[[], tuple[str, ...]] = tuple  # folders to read besides those of the steps' own programs
    closing: str = ""  # what encloses the function, after its last brace
    missing: Callable[[Fields], str | None] = lambda problem: None  # the library that a problem lacks here

    def job(self, problem: Fields, answer: str, limits: Limits, token: str) -> Job:
        """Return the program that passes only by printing the token after the last test."""
        steps = self.steps(limits, token)
        reads = [folder for step in steps for folder in home(step.command[0])] + list(self.reads())
        return Job(self.files(problem, answer), steps, tuple(dict.fromkeys(reads)))


def language(name: str) -> Language:
    """Return a language by the name that HumanEval-X's files have. Raises ConfigError."""
    if name not in LANGUAGES:
        raise ConfigError(f"HumanEval-X has no language {name!r}; {suggest(name, LANGUAGES)}")
    return LANGUAGES[name]


@functools.cache
def missing_toolchain(name: str) -> str | None:
    """Return why programs in a language cannot run here, or None where they can."""
    missing = [tool for tool in language(name).tools if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found on this machine" if missing else None


LANGUAGES = {
    "python": Language("python", "Python", "#", (), PYTHON_STOP, python_files, python_steps),
    "js": Language("js", "JavaScript", "//", ("node",), ("\n}",), js_files, js_steps),
    "cpp": Language("cpp", "C++", "//", ("g++",), ("\n}",), cpp_files, cpp_steps, missing=cpp_missing),
    "java": Language("java", "Java", "//", ("javac", "java"), ("\n    }\n",), java_files, java_steps, closing="\n}"),
    "go": Language("go", "Go", "//", ("go",), GO_STOP, go_files, go_steps, reads=go_reads),
    "rust": Language("rust", "Rust", "//", ("rustc",), RUST_STOP, rust_files, rust_steps, missing=rust_missing),
}
