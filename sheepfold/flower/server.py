"""The server: a SuperLink, what starts coordinators, and the proxy, kept alive; who is enrolled; the jobs.

    sheepfold server ─┬─ superlink   on loopback
                      ├─ superexec ── coordinator of the running job
                      └─ proxy       the one door

Everything it knows is in its folder, so that one killed at any moment goes on when it is started again.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

from sheepfold import listening
from sheepfold.errors import ConfigError, SheepfoldError
from sheepfold.flower import certs, registry, superlink
from sheepfold.flower.fold import Fold, stamp, write_json
from sheepfold.flower.keeper import Keeper
from sheepfold.flower.superlink import Unreachable
from sheepfold.flower.supervise import LEAN, Child, flower_environment, stop_all
from sheepfold.locks import try_lock

STEP_S = 0.25
TO_ANSWER_S = 60.0
"""Seconds after which a SuperLink that does not answer is worth a line"""
Say = Callable[[str], None]


class Server:
    """One fold's processes."""

    def __init__(self, fold: Fold, taken: socket.socket, say: Say) -> None:
        """taken: the bound socket that nodes call."""
        self.fold, self.say = fold, say
        self.link = superlink.Superlink(fold, _free_port())
        self.children = _children(self.link, taken)
        self.keeper = Keeper(fold, say, self._once)
        self._known: tuple[object, int] | None = None
        self._certificate = stamp(fold.certificate)
        self._started = time.monotonic()
        self._said: set[str] = set()

    @property
    def ready(self) -> bool:
        """Whether the SuperLink knows who is enrolled, and so nodes may come."""
        return self._known is not None

    def start(self, taken: socket.socket) -> None:
        """Write down where it is, and start what there is to start."""
        where = address(taken)
        write_json(self.fold.server, {"pid": os.getpid(), "address": where, "superlink": self.link.port})
        for child in self.children:
            child.start()

    def step(self) -> None:
        """Look after everything once."""
        for child in self.children:
            child.step(self.say)
        self._renewed()
        try:
            self._enrolled()
            self.keeper.step()
        except Unreachable as error:
            if time.monotonic() - self._started > TO_ANSWER_S:
                self._once(f"{error}; see {self.fold.logs / 'superlink.log'}")
        except SheepfoldError as error:  # such as a nodes.json that is being edited
            self._once(str(error))

    def _enrolled(self) -> None:
        """Tell the SuperLink who is enrolled, where nodes.json changed or it was started anew."""
        now = (stamp(self.fold.nodes), self.children[0].starts)
        if now != self._known:
            for line in superlink.reconcile(self.link):
                self._once(line)
            self._known = now  # its numbers, written down just now, are looked at once more

    def _renewed(self) -> None:
        """Start what holds the server's certificate anew, where that was renewed."""
        now = stamp(self.fold.certificate)
        if now != self._certificate:
            self._certificate, self._started = now, time.monotonic()
            self.say(f"{self.fold.certificate}: renewed; the SuperLink and the proxy start again with it")
            for child in (self.children[0], self.children[2]):
                child.restart()

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def serve(fold: Fold, host: str, port: int, say: Say) -> None:
    """Be the fold's server until SIGTERM or SIGINT. Raises ConfigError where it cannot be."""
    fold.require()
    held = try_lock(fold.lock)
    if held is None:
        raise ConfigError(f"{fold.path}: a server runs here already; stop it first (its pid is in {fold.server})")
    with held, listening.bind(host, port) as taken:
        superlink.make_secret(fold)
        for folder in (fold.seen, fold.jobs, fold.logs, fold.home):
            folder.mkdir(exist_ok=True, mode=0o700)
        stopping = _on_signals()
        server = Server(fold, taken, say)
        try:
            server.start(taken)
            while not stopping and not server.ready:
                server.step()
                time.sleep(STEP_S)
            for line in greeting(fold, address(taken)) if server.ready else ():
                say(line)
            while not stopping:
                server.step()
                time.sleep(STEP_S)
        finally:
            stop_all(server.children)
            fold.server.unlink(missing_ok=True)
    say("stopped; a run that was going on resumes when the server is started again")


def address(taken: socket.socket) -> str:
    """Return host:port of a bound socket."""
    name, port = taken.getsockname()[:2]
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def greeting(fold: Fold, where: str) -> list[str]:
    """Return what people want to know of a server that has started."""
    ca, server = certs.read(fold)
    names = list(registry.nodes(fold))
    lines = [
        f"listening on {where}; nodes call {', '.join(server.hosts)}",
        f"nodes need {fold.ca}, SHA-256 {ca.fingerprint}",
        f"enrolled: {', '.join(names)}" if names else "enrolled: nobody; `sheepfold enroll PUBKEY --name NAME`",
    ]
    return lines + [line for line in (ca.warning(), server.warning()) if line]


def _children(link: superlink.Superlink, taken: socket.socket) -> list[Child]:
    fold = link.fold
    environment = flower_environment(fold.home, SHEEPFOLD_FOLD=str(fold.path), FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.25")
    door = [sys.executable, "-m", "sheepfold.flower.proxy", str(fold.path), str(taken.fileno())]
    commands: dict[str, Callable[[], list[str]]] = {
        "superlink": link.command,
        "superexec": link.executor_command,
        "proxy": lambda: door,
    }
    return [
        Child(
            name=name,
            command=command,
            log=fold.logs / f"{name}.log",
            environment=environment if name == "superexec" else environment | LEAN,  # it starts what computes
            pass_fds=(taken.fileno(),) if name == "proxy" else (),
        )
        for name, command in commands.items()
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((superlink.HOST, 0))
        return int(probe.getsockname()[1])


def _on_signals() -> list[int]:
    """Return a list that the first SIGTERM or SIGINT is added to."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught
