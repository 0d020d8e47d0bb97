"""A server and its clients as processes of this machine, each client with its key, its rows and its node.yaml.

<folder>/fold/         the server's
<folder>/<client>/     node.yaml, key, rows, and what the client keeps
<folder>/runs/         what the server writes of runs
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from sheepfold.flower import certs, keys, registry
from sheepfold.flower.fold import Fold
from tests.network.servers import Server, environment, program, until

Rows = Sequence[Mapping[str, Any]]
Process = subprocess.Popen[bytes]
THREE = {"ann": 24, "bob": 17, "cleo": 30}
"""Clients of the fixture `federation` -> their rows, which lie in <folder>/rows, too"""
CLIENT = (program("sheepfold"), "client")


class Federation:
    """A server and its clients."""

    def __init__(self, folder: Path, names: Sequence[str], *, hosts: Sequence[str] = ("localhost",), **server: Any):
        """Make keys and certificates for these clients and server addresses; server: see servers.Server."""
        self.folder, self.names = folder, list(names)
        folder.mkdir(parents=True, exist_ok=True)
        self.fold = Fold(folder / "fold")
        certs.make(self.fold, list(hosts), 30)
        for name in names:
            (folder / name).mkdir()
            keys.make(folder / name / "key", folder / name / "key.pub", name)
            registry.enroll(self.fold, name, folder / name / "key.pub")
        self.server = Server(self.fold, folder / "server.log", **server)
        self.clients: dict[str, Process] = {}
        self.runs: list[Run] = []

    def node(self, name: str, rows: Rows, server: str | None = None, **settings: Any) -> Path:
        """Write a client's rows and node.yaml; server: as this client dials it."""
        home = self.folder / name
        write_rows(home / "rows.jsonl", rows)
        usual = {
            "name": name,
            "server": server or self.server.address,
            "ca": str(self.fold.ca),
            "key": "key",
            "data": "rows.jsonl",
            "folder": "kept",
        }
        (home / "node.yaml").write_text(yaml.safe_dump({**usual, **settings}))
        return home / "node.yaml"

    def join(self, name: str, command: Sequence[str] = CLIENT, before: Sequence[str] = ()) -> Process:
        """Start a client's machine; before: words before its command, such as `ip netns exec NAME`."""
        home = self.folder / name
        self.clients[name] = started([*before, *command, str(home / "node.yaml")], home, home / "client.log")
        return self.clients[name]

    def there(self, names: Sequence[str] | None = None, wait: float = 120) -> None:
        """Wait until these clients, or all, are connected."""
        names = self.names if names is None else names
        until(lambda: all(self.sessions().get(name) for name in names), wait, f"{', '.join(names)} to connect")

    def sessions(self) -> dict[str, str]:
        """Return the session that each client was last heard in."""
        found = {}
        for path in self.fold.seen.glob("*.json"):
            with suppress(ValueError, OSError):
                found[path.stem] = json.loads(path.read_text())["session"]
        return found

    def run(self, experiment: Mapping[str, Any], *words: str) -> "Run":
        """Begin a run, as people type it at the server."""
        path = self.folder / "experiment.yaml"
        path.write_text(yaml.safe_dump({"output": str(self.folder / "runs"), **experiment}))
        run = [program("sheepfold"), "run", str(path), "--on", "flower", "--fold", str(self.fold.path), *words]
        self.runs.append(Run(self.folder, [*self.server.before, *run]))
        return self.runs[-1]

    def close(self) -> None:
        """End everything, by force where it must be."""
        own = [run.process for run in self.runs] + [*self.clients.values()]
        for process in [*own, *([self.server.process] if self.server.process else [])]:
            end(process)
        self.clients, self.runs = {}, []

    def __enter__(self) -> "Federation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Run:
    """A run, followed by the command that began it."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.runs, self.log = folder / "runs", folder / f"run-{time.time_ns()}.log"
        self._before = set(self.runs.glob("*"))
        self._folder: Path | None = None
        self.process = started(command, folder, self.log)

    @property
    def folder(self) -> Path | None:
        """The run's folder, once it is there."""
        if self._folder is None:
            self._folder = next((path for path in set(self.runs.glob("*")) - self._before if path.is_dir()), None)
        return self._folder

    def lines(self) -> list[dict[str, Any]]:
        """Return the journal so far."""
        with suppress(FileNotFoundError, TypeError):
            text = (self.folder / "rounds.jsonl").read_text(encoding="utf-8")  # type: ignore[operator]
            return [json.loads(line) for line in text.split("\n")[:-1]]
        return []

    def reach(self, round: int, wait: float = 300) -> None:
        """Wait until a round is in the journal."""
        until(lambda: any(line["round"] >= round for line in self.lines()) or self._over(), wait, f"round {round}")

    def finish(self, wait: float = 500) -> list[dict[str, Any]]:
        """Wait for the end and return the journal; fails the test where the run failed."""
        self.process.wait(wait)
        assert self._over()
        return self.lines()

    def said(self) -> str:
        """Return what the command printed."""
        return self.log.read_text()

    def _over(self) -> bool:
        code = self.process.poll()
        assert code in (None, 0), self.said()
        return code == 0


def below(owner: Process, word: str) -> Iterator[psutil.Process]:
    """Yield the processes below one whose command has this word."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(owner.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(word in part for part in process.cmdline()):
                    yield process


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def started(words: Sequence[str], folder: Path, log: Path) -> Process:
    """Start a command in a folder, as the head of a session of its own."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            list(words), cwd=folder, env=environment(PATH=_path()), stdout=out, stderr=out, start_new_session=True
        )


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def end(process: Process) -> None:
    """End a process and all below it, by force where it must be."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in psutil.wait_procs(family, 5)[1]:
        left.kill()
