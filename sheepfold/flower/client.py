"""`sheepfold client`: one client's machine, which dials out only and keeps its processes alive.

    supervisor ─┬─ SuperNode   Flower's, talks to the server, over TLS and with this machine's key
                ├─ executor    ours, answers messages, keeps the base loaded; hears nobody but its SuperNode
                └─ heartbeat   a thread: the server knows within ten seconds that this machine is gone

A session begins when the SuperNode is in and ends with either process. A new one tells the server that a message which
was on its way to the last will not be answered, so neither end waits for it.
"""

import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.flower import session
from sheepfold.flower.executor import NODE
from sheepfold.flower.fold import read_json, write_json
from sheepfold.flower.heartbeat import Heartbeat, Unreachable
from sheepfold.flower.keys import write_private
from sheepfold.flower.supervise import LEAN, Child, flower_environment, stop_all
from sheepfold.locks import try_lock
from sheepfold.node.settings import NodeSettings

STEP_S = 0.2
JOINED = "SuperNode ID: "
"""What a SuperNode writes when the server has let it in"""
HELD = "code: 2004"
"""What it writes where the server does not, since its key's last session is still open"""
GAVE_UP = re.compile(rb"ERROR (\x1b\[0m)?:")
"""What it writes where a call failed for good, as one does whose line breaks while TLS is being agreed on: it goes on
without the message, or asks for no more"""
HELD_S = 100.0
"""Flower closes a session after a minute of silence; one that is open longer is somebody else's"""
REFUSED_S = 30.0
"""A server that takes no heartbeats for so long has struck this machine off"""
LONGEST_KNOCK_S = 15.0

Say = Callable[[str], None]


class Client:
    """One client's machine at work."""

    def __init__(self, settings: NodeSettings, say: Say) -> None:
        """say: is told one line of what people should know."""
        self.settings, self.say = settings, say
        self.heartbeat = Heartbeat(settings)
        self._place = _reserved()
        self._address = f"127.0.0.1:{self._place.getsockname()[1]}"
        self._told, self._pipe = os.pipe()
        os.set_blocking(self._told, False)
        self._rest = b""
        folder = settings.folder
        secret = folder / "superexec.secret"
        write_private(secret, secrets.token_bytes(32))
        logs, environment = folder / "logs", flower_environment(folder / "flower")
        self.supernode = Child(
            name="SuperNode", command=self._supernode, log=logs / "supernode.log", environment=environment | LEAN
        )
        words = [sys.executable, "-m", "sheepfold.flower.executor", self._address, str(secret), str(self._pipe)]
        self.executor = Child(
            name="executor",
            command=lambda: words,
            log=logs / "executor.log",
            environment=environment | {NODE: settings.model_dump_json()},
            pass_fds=(self._pipe,),
        )
        self._read_to = self._heard_to = 0
        self._held_since: float | None = None
        self._refused_since: float | None = None

    def serve(self) -> None:
        """Take part until a signal ends it. Raises ConfigError where the server will not have this machine."""
        self._welcome()
        self.heartbeat.start()
        try:
            while True:
                self._step()
                time.sleep(STEP_S)
        finally:
            self.heartbeat.session = ""
            stop_all([self.executor, self.supernode])
            self.heartbeat.stop()
            self._place.close()

    def _welcome(self) -> None:
        """Knock until the server answers."""
        pause = 1.0
        while True:
            try:
                return self.heartbeat.knock()
            except Unreachable as error:
                self.say(f"{error}; knocks again in {pause:g} s")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_KNOCK_S)

    def _step(self) -> None:
        """Look after both processes once."""
        self._hear()
        lives = self.executor.starts
        self.executor.step(self.say)
        if lives and (self.executor.process is None or self.executor.starts > lives):
            self._renew()  # the server need not wait for what the executor was at
        if self.executor.process is None:
            return
        running = self.supernode.process is not None
        self.supernode.step(self.say)
        if self.supernode.process is None:
            self._leave()
            if running:
                self._ended()
        elif not self.heartbeat.session:
            self._look_in()
        elif self._gave_up():
            self.say(f"SuperNode gave up on a call; starts again, its log is {self.supernode.log}")
            self._renew()
        self._check_refused()

    def _supernode(self) -> list[str]:
        """Return the SuperNode's command, when the session of the one before is closed."""
        settings, log = self.settings, self.supernode.log
        if (known := read_json(self._known)) is not None:
            session.close(settings, int(known["node_id"]))
        self._read_to = self._heard_to = log.stat().st_size if log.exists() else 0
        host, _, port = self._address.rpartition(":")
        return [
            *("flower-supernode", "--superlink", settings.server, "--root-certificates", str(settings.ca)),
            *("--auth-supernode-private-key", str(settings.key), "--host", host, "--port", port),
            *("--isolation", "process", "--superexec-auth-secret-file", str(settings.folder / "superexec.secret")),
        ]

    @property
    def _known(self) -> Path:
        """Flower's number of this node."""
        return self.settings.folder / "supernode.json"

    def _look_in(self) -> None:
        """Begin a session where the SuperNode is in."""
        text = self._log()
        if JOINED not in text or not (number := text.partition(JOINED)[2].split()[0]).isdecimal():
            return
        write_json(self._known, {"node_id": int(number)})
        self.heartbeat.session, self._held_since = secrets.token_hex(8), None
        self.say(f"connected to {self.settings.server} as {self.settings.name}")

    def _ended(self) -> None:
        """Find out why a SuperNode was not let in. Raises ConfigError where it will not be."""
        if HELD not in self._log():
            return
        with suppress(Unreachable):
            self.heartbeat.knock()  # tells whether it is the key that is not wanted
        self._held_since = self._held_since or time.monotonic()
        if time.monotonic() - self._held_since > HELD_S:
            raise ConfigError(
                f"key {self.settings.key}: another machine is connected with it; stop that one, or enrol a key of this "
                "machine's own"
            )

    def _gave_up(self) -> bool:
        """Return whether the SuperNode has given up on a call, by what it wrote since the last look."""
        start, text = self._written(self._heard_to)
        lines = text.rpartition(b"\n")[0]
        self._heard_to = start + len(lines)
        return GAVE_UP.search(lines) is not None

    def _log(self) -> str:
        """Return what the SuperNode has written since its start."""
        return self._written(self._read_to)[1].decode(errors="replace")

    def _written(self, place: int) -> tuple[int, bytes]:
        """Return the SuperNode's log from a place on, and that place: a log that was turned over is shorter."""
        with open(self.supernode.log, "rb") as log:
            start = log.seek(min(place, self.supernode.log.stat().st_size))
            return start, log.read()

    def _renew(self) -> None:
        """End the session in good order; the next look starts another SuperNode."""
        self._leave()
        self.supernode.stop()

    def _leave(self) -> None:
        if self.heartbeat.session:
            self.heartbeat.session = ""
            self.say("disconnected")

    def _check_refused(self) -> None:
        """Raise the server's refusal where it stays so."""
        refused = self.heartbeat.refused
        if refused is None:
            self._refused_since = None
            return
        self._refused_since = self._refused_since or time.monotonic()
        if time.monotonic() - self._refused_since > REFUSED_S:
            raise refused

    def _hear(self) -> None:
        """Pass on what the executor tells."""
        with suppress(BlockingIOError):
            while part := os.read(self._told, 65536):
                self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._note(json.loads(line))

    def _note(self, told: dict[str, Any]) -> None:
        if "refused" in told:
            raise ConfigError(told["refused"])
        if "state" in told:
            self.heartbeat.state = told["state"]
        if "renew" in told:
            self._renew()
        if "say" in told:
            self.say(told["say"])


def run(settings: NodeSettings, say: Say) -> None:
    """Be a client until SIGTERM or Ctrl-C. Raises ConfigError or CheckpointError in one line for what cannot be."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    held = try_lock(settings.folder / "client.lock")
    if held is None:
        raise CheckpointError(f"{settings.folder}: another client is at work here; stop it, or give this one a folder")
    with held, _ended_by(signal.SIGTERM):
        Client(settings, say).serve()
    say(f"stopped; what this machine keeps is in {settings.folder}")


@contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Take a signal as Ctrl-C, and end quietly by either."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, end)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(number, before)


def _reserved() -> socket.socket:
    """Return a socket that holds a free port on loopback: bound and silent, so that the SuperNode can listen there."""
    place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    return place
