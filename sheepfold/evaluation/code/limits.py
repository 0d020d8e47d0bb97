"""What a program may use, what held it in, and how it ended: three values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

KIB, MIB = 1024, 1024 * 1024

Killed = Literal["time", "memory", "processes", "guard"]
"""Which limit a program was ended for; guard: it ended what watched it, which takes it along in a namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one command of a program may use."""

    timeout_s: float = 15.0  # wall clock; catches programs that wait
    cpu_s: int = 5  # processor seconds of each process; catches programs that loop, however busy the machine is
    memory_mib: int = 1024  # of each process, and of all of them together
    reserves_memory: bool = False  # node and java reserve far more addresses than they use: bound what they write to
    file_mib: int = 16  # the largest file
    folder_mib: int = 64  # all files together; in force where the folder is the sandbox's own
    open_files: int = 128  # file descriptors of each process
    processes: int = 32  # processes and threads at once
    output_kib: int = 64  # what is kept of each stream: its end


@dataclass(frozen=True, slots=True)
class Step:
    """One command, run in the program's folder."""

    command: tuple[str, ...]
    limits: Limits = Limits()
    stdin: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A program: its files, and the commands that build and run it, the next one only after the last one's success."""

    files: Mapping[str, str]  # path in the program's folder -> text
    steps: tuple[Step, ...]
    reads: tuple[str, ...] = ()  # folders beyond the system's that the commands need to read

    def as_dict(self) -> dict[str, Any]:
        steps = [{"command": step.command, "stdin": step.stdin, "limits": asdict(step.limits)} for step in self.steps]
        return {"files": dict(self.files), "steps": steps, "reads": list(self.reads)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """What was in force around a program."""

    network: Literal["namespace", "filter", "none"]  # a network of its own without a way out; no sockets; the machine's
    processes: Literal["pid namespace", "subreaper", "process group"]  # how every descendant is found and killed
    files: Literal["private root", "none"]  # private root: system folders read-only, writes to a folder in memory
    user: Literal["unused id", "own"]  # own: the program runs as the user who runs the evaluation
    limits: tuple[str, ...] = ()  # the limits of `Limits` that the system applies
    why: str = ""  # what the system said where something is missing

    @property
    def complete(self) -> bool:
        """Whether the program had no network, no way to survive, and no file but its own."""
        return self.network == "namespace" and self.processes == "pid namespace" and self.files == "private root"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "limits": list(self.limits)}

    def sentence(self) -> str:
        """Return one line for people."""
        if self.complete:
            return "generated programs ran without a network, in their own process and file namespaces"
        network = "no socket could be opened" if self.network == "filter" else "the network was in reach"
        return f"generated programs ran with limits but WITHOUT isolation: {network}, so were files ({self.why})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended: its last command's end, since a failed one is the last."""

    step: int  # which command, from 0
    exit_code: int | None  # None where a signal ended it
    signal: int | None = None
    killed: Killed | None = None
    seconds: float = 0.0
    peak_mib: float = 0.0  # of the command's own process
    stdout: str = ""  # the end of it
    stderr: str = ""
    isolation: Isolation = field(repr=False)

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and self.killed is None
