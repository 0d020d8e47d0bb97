"""The follower: reads a run's folder from where it stopped, and hands what is new to one tracker.

    rounds.jsonl ──┐                         ┌─ TensorBoard
    closing.json ──┼─ new since memory? ─────┼─ Weights & Biases
    eval/*.json  ──┘   tracking/<name>.json  └─ MLflow

The memory holds the tracker's own name for the run, so that a resumed run goes on in the same place, and the last round
that was sent, so that none is sent twice: a resumed run repeats the bits of the rounds that it does again.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sheepfold.errors import ConfigError, require
from sheepfold.folders import replace_file, writing
from sheepfold.journal import RunFolder
from sheepfold.report.benchmarks import read_benchmarks
from sheepfold.tracking import ARGUMENTS, journal_figures
from sheepfold.tracking.running import Status

LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""tracker -> the module that it needs, also its extra's name"""
CLOSING = "closing.json"


@dataclass(frozen=True, slots=True)
class Start:
    """What a tracker needs to begin a run, or to go on with one."""

    name: str
    config: Mapping[str, Any]
    """The experiment's options, flat."""
    facts: Mapping[str, str]
    """What the data and the base were."""
    folder: Path
    """tracking/ of the run."""
    id: str | None
    """The tracker's own name for the run, where it has begun one."""
    first: int
    """The first round that will be sent."""
    arguments: Mapping[str, str]


class Tracker(Protocol):
    """One of the three; a file each has a class of this shape, made with a Start."""

    id: str
    last: int | None
    """The last round that the tracker itself says it has, where it can say."""

    def round(
        self, round: int, scalars: Mapping[str, float], spreads: Mapping[str, Sequence[float]], adapter: str
    ) -> None:
        """Log one round: numbers, numbers that each client has one of, and the adapter's hash."""

    def figures(self, round: int, scalars: Mapping[str, float]) -> None:
        """Log what was measured once, after a round."""

    def close(self, status: Status) -> None:
        """Send what is left, and say where the run stands, as far as the tracker has a word for it."""


@dataclass(slots=True)
class Memory:
    """What a tracker was sent."""

    id: str | None = None
    round: int = -1
    files: dict[str, str] = field(default_factory=dict)
    """closing.json, eval/*.json -> hash of what was sent"""
    arguments: dict[str, str] = field(default_factory=dict)
    status: Status = "open"


class Follower:
    """Hands one run's folder to one tracker; use as a context manager, and `catch_up` whenever something was written.

    Raises ConfigError where the tracker's library is missing, where other arguments were used before, or where another
    process follows the same run for the same tracker.
    """

    def __init__(self, run: RunFolder, name: str, arguments: Mapping[str, str]) -> None:
        check_installed([name])
        self.run, self.name, self.arguments = run, name, dict(arguments)
        self.folder = run.path / "tracking"
        self.status: Status = "open"  # whoever follows sets it once the run has ended
        self._read, self._journal = 0, -1  # bytes of the journal read so far, and of which file (its inode)
        self._tracker: Tracker | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Follower":
        self._open.enter_context(self._alone())
        self.memory = self._remembered()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._open:
            if kind is None and self.memory.id is not None and self.status != self.memory.status:
                self._begun()  # even if nothing is new: the tracker thinks that the run stands elsewhere
            if self._tracker is not None:
                self._tracker.close(self.status)
                self.memory.status = self.status
                self._remember()

    def catch_up(self) -> int:
        """Send what is new; return the number of rounds sent."""
        lines = [line for line in self._new_lines() if line["round"] > self.memory.round]
        sent = 0
        for line in lines:
            tracker = self._begun()
            if tracker.last is None or line["round"] > tracker.last:
                tracker.round(
                    line["round"], journal_figures.scalars(line), journal_figures.spreads(line), line["adapter"]
                )
                sent += 1
            self.memory.round = line["round"]
            self._remember()
        for file, content in self._new_files():
            if figures := self._figures(file, content):
                self._begun().figures(max(self.memory.round, 0), figures)
            self.memory.files[file] = _hash(content)
            self._remember()
        return sent

    def _figures(self, file: str, content: bytes) -> dict[str, float]:
        """Return what a file tells; nothing where it is no results of ours or lm-eval's, or is not whole yet."""
        if file == CLOSING:
            return journal_figures.closing(json.loads(content))
        results = read_benchmarks(self.run.path / "eval")
        return journal_figures.benchmarks(each for each in results if f"eval/{each.file}" == file)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the journal's whole lines since the last call; all of them where a resumed run wrote it anew."""
        path = self.run.path / "rounds.jsonl"
        if not path.is_file():
            return
        with open(path, "rb") as file:
            inode = path.stat().st_ino
            self._read, self._journal = (self._read if inode == self._journal else 0), inode
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield json.loads(line)

    def _new_files(self) -> Iterator[tuple[str, bytes]]:
        for path in [self.run.path / CLOSING, *sorted((self.run.path / "eval").glob("*.json"))]:
            name = path.relative_to(self.run.path).as_posix()
            if path.is_file() and self.memory.files.get(name) != _hash(content := path.read_bytes()):
                yield name, content

    def _begun(self) -> Tracker:
        if self._tracker is None:
            module = importlib.import_module(f"sheepfold.tracking.{self.name}")
            made: Tracker = module.begin(self._start())
            self._tracker, self.memory.id = made, made.id
            self._remember()
        return self._tracker

    def _start(self) -> Start:
        experiment, data = self.run.experiment(), self.run.data()
        facts = {"data": data["fingerprint"], "base": data["base"], "clients": str(len(data["clients"]))}
        return Start(
            name=self.run.path.resolve().name,
            config=journal_figures.flat(experiment.model_dump(mode="json")),
            facts=facts,
            folder=self.folder,
            id=self.memory.id,
            first=self.memory.round + 1,
            arguments=self.arguments,
        )

    def _remembered(self) -> Memory:
        path = self.folder / f"{self.name}.json"
        if not path.is_file():
            return Memory(arguments=self.arguments)
        try:
            memory = Memory(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: damaged; remove it to send the run to {self.name} anew") from None
        where = {key: value for key, value in self.arguments.items() if key != "mode"}
        before = {key: value for key, value in memory.arguments.items() if key != "mode"}
        if memory.id is not None and where and where != before:
            told = ", ".join(f"{k} {v}" for k, v in before.items()) or "no arguments"
            raise ConfigError(f"{self.run.path}: is in {self.name} with {told}; keep to it, or remove {path}")
        self.arguments = memory.arguments = {**memory.arguments, **self.arguments}
        return memory

    def _remember(self) -> None:
        path = self.folder / f"{self.name}.json"
        with writing(path):
            replace_file(path, (json.dumps(asdict(self.memory), indent=1) + "\n").encode())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the tracker of this run for one process: two would send every round twice."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f".{self.name}.lock", "w")  # noqa: SIM115, held until the follower ends
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.run.path}: another process sends this run to {self.name}; let it, or stop it"
                ) from None
            yield


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose library is not installed, or that is none of ours."""
    for name in names:
        if name not in ARGUMENTS:
            raise ConfigError(f"--to {name!r}: known: {', '.join(ARGUMENTS)}")
        require(f"tracker {name}", name, LIBRARIES[name])


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
