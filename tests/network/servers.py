"""Real servers and nodes on loopback: certificates, keys, processes; all gone when a test is."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sheepfold.flower import certs, keys, registry
from sheepfold.flower.fold import Fold, read_json
from sheepfold.flower.supervise import flower_environment

SHEEPFOLD = [sys.executable, "-m", "sheepfold.cli"]
NAMES = ("ward-7", "lab", "clinic")
START_S = 90.0
"""A bound on hanging, not on speed: machines that run two suites at once are slow"""


def until(true: Callable[[], Any], seconds: float = START_S, what: str = "it") -> Any:
    """Return the first true answer; fails the test where none comes in time."""
    end = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < end, f"{what} took longer than {seconds:g} s"
        time.sleep(0.05)
    return answer


def make_fold(folder: Path, names: Sequence[str] = NAMES) -> Fold:
    """Return a new server's folder, with these clients enrolled; their keys lie in <folder>/keys."""
    fold = Fold(folder / "fold")
    certs.make(fold, ["localhost"], 90)
    (folder / "keys").mkdir()
    for name in names:
        keys.make(folder / "keys" / f"{name}.key", folder / "keys" / f"{name}.pub", name)
        registry.enroll(fold, name, folder / "keys" / f"{name}.pub")
    return fold


@dataclass
class Server:
    """`sheepfold server` as a process."""

    fold: Fold
    log: Path
    port: int = 0
    """0: a free one at the first start, the same one afterwards"""
    listen: str = "127.0.0.1"
    """Its host's address that it listens on"""
    before: Sequence[str] = ()
    """Words before the command, such as `ip netns exec NAME`"""
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, and wait until nodes may come."""
        self.fold.server.unlink(missing_ok=True)
        words = ["server", "--fold", str(self.fold.path), "--host", self.listen, "--port", str(self.port)]
        before = self.said.count("listening on")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.before, *SHEEPFOLD, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=self.log.parent,
            )
        until(lambda: self._is_up(before), what=f"the server's start ({self.log})")
        self.port = int(self.address.rpartition(":")[2])

    def _is_up(self, before: int) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.said
        return self.said.count("listening on") > before

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def address(self) -> str:
        """host:port that nodes call."""
        return str((read_json(self.fold.server) or {})["address"])

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"https://{self.address}"

    @property
    def superlink(self) -> str:
        """host:port of the SuperLink behind it."""
        return f"127.0.0.1:{(read_json(self.fold.server) or {})['superlink']}"

    def child(self, name: str) -> int:
        """Return the process id of superlink, superexec or proxy; waits until there is one."""
        assert self.process is not None
        word = {"superlink": "flower-superlink", "superexec": "flower-superexec", "proxy": "flower.proxy"}[name]
        return int(until(lambda: next(iter(children_of(self.process.pid, word)), None), what=name))  # type: ignore[union-attr]

    def kill(self) -> None:
        """End it as a power cut would, and wait for it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end, and return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def client(self) -> httpx.Client:
        """Return an HTTP client that trusts its CA and holds no node's key."""
        return httpx.Client(base_url=self.url, verify=ssl.create_default_context(cafile=str(self.fold.ca)), timeout=20)


@contextlib.contextmanager
def running(folder: Path, names: Sequence[str] = NAMES) -> Iterator[Server]:
    """Yield a server that has started, in a new folder."""
    server = Server(make_fold(folder, names), folder / "server.log")
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()


def environment(**more: str) -> Mapping[str, str]:
    """Return a process's environment: one thread, no hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def supernode(folder: Path, address: str, *words: str) -> "subprocess.Popen[bytes]":
    """Start a bare SuperNode with these words more; its log is <folder>/node.log."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["flower-supernode", "--superlink", address, "--port", str(port), "--isolation", "process", *words]
    env = flower_environment(folder / "flower")
    with open(folder / "node.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, executable=program(command[0]))


def program(name: str) -> str:
    """Return the path of one of this environment's programs."""
    return str(Path(sys.executable).parent / name)


def children_of(pid: int, word: str) -> list[int]:
    """Return the ids of a process's children whose command has a word in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and word in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def write_node(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write a client's node.yaml; JSON is YAML."""
    path.write_text(json.dumps(settings))
    return path
