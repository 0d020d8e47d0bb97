"""Two hosts with addresses of their own, and between them a line that is 40 ms long and breaks now and then.

    client  10.72.0.2 ── 10.72.0.1  between  10.71.0.1 ── 10.71.0.2  server
                                   lossy.py

No end has a route to the other: what passes is what lossy.py carries.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
import torch

from sheepfold import simulation
from sheepfold.assets import corpus
from tests.network.federation import Federation, write_rows
from tests.network.servers import environment, until
from tests.runs import experiment

pytestmark = pytest.mark.network

SERVER, NEAR_SERVER = "10.71.0.2", "10.71.0.1"
CLIENT, NEAR_CLIENT = "10.72.0.2", "10.72.0.1"
ROWS = {"ann": 24, "bob": 17}
DROP = "0.02"
"""Chance that a piece of up to 64 kB breaks its connection, half of it in each direction"""
LEAST_BROKEN = 3
OPTIONS: dict[str, Any] = {
    "train.clients_per_pass": 1, "federation.rounds": 3, "data.rows": None, "data.partition": {"by": "files"},
}  # fmt: skip
DIAL = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"


@dataclass(frozen=True)
class Hosts:
    """Three network namespaces, for one test."""

    mark: str

    def inside(self, host: str) -> list[str]:
        """Return the words before a command that is to run on a host: server, between or client."""
        return ["ip", "netns", "exec", self.name(host)]

    def name(self, host: str) -> str:
        """Return a host's name on this machine."""
        return f"sheepfold-{self.mark}-{host}"

    def wire(self, host: str, address: str, near: str) -> None:
        """Lay a line from a host to the one between; address: the host's, near: that of the line's other end."""
        ip("-n", self.name(host), "link", "add", "line", "type", "veth", "peer", "name", host, "netns", self.between)
        for place, link, own in ((self.name(host), "line", address), (self.between, host, near)):
            ip("-n", place, "address", "add", f"{own}/24", "dev", link)
            ip("-n", place, "link", "set", link, "up")

    @property
    def between(self) -> str:
        """The name of the host between the two."""
        return self.name("between")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three hosts, two lines, and no route from end to end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    made = Hosts(secrets.token_hex(4))
    names = [made.name(host) for host in ("server", "between", "client")]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        made.wire("server", SERVER, NEAR_SERVER)
        made.wire("client", CLIENT, NEAR_CLIENT)
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def line(hosts: Hosts, tmp_path: Path) -> Iterator["Line"]:
    """The bad line, not yet laid."""
    made = Line(hosts, tmp_path / "lossy.log")
    yield made
    made.end()


class Line:
    """lossy.py between the two hosts."""

    def __init__(self, hosts: Hosts, log: Path) -> None:
        self.hosts, self.log = hosts, log
        self.process: subprocess.Popen[bytes] | None = None

    def lay(self, port: str) -> None:
        """Carry what the client's host says to this port on to the server's."""
        script = str(Path(__file__).with_name("lossy.py"))
        command = [sys.executable, script, f"{NEAR_CLIENT}:{port}", f"{SERVER}:{port}", "--drop", DROP]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([*self.hosts.inside("between"), *command], stdout=log, stderr=log)
        until(lambda: "listening" in self.log.read_text(), what="the line")

    @property
    def broken(self) -> int:
        """How many connections it broke."""
        return self.log.read_text().count("broken ")

    def end(self) -> None:
        """Cut it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them, and the processes have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_over_a_bad_line_comes_to_the_bits_of_one_process(
    hosts: Hosts, line: Line, one_thread: None, tmp_path: Path
) -> None:
    rows = iter(corpus.rows(sum(ROWS.values()), seed=3))
    (tmp_path / "rows").mkdir()
    at_server = {"before": hosts.inside("server"), "listen": SERVER}
    with Federation(tmp_path, list(ROWS), hosts=[NEAR_CLIENT], **at_server) as federation:
        federation.server.start()
        port = federation.server.address.rpartition(":")[2]
        assert "unreachable" in dialled(hosts, SERVER, port)
        line.lay(port)
        assert dialled(hosts, NEAR_CLIENT, port) == ""
        for name, count in ROWS.items():
            own = [next(rows) for _ in range(count)]
            write_rows(tmp_path / "rows" / f"{name}.jsonl", own)
            federation.node(name, own, f"{NEAR_CLIENT}:{port}")
            federation.join(name, before=hosts.inside("client"))
        federation.there(wait=240)  # where the answer to the first of all calls is lost, Flower wants a minute
        whole = experiment(tmp_path, **OPTIONS, **{"data.source": str(tmp_path / "rows")})
        lines = federation.run(whole.model_dump(mode="json")).finish()
        broken = line.broken
    assert broken >= LEAST_BROKEN
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert all(line["absent"] == {} for line in lines[1:])
    assert lines[-1]["adapter"] == simulation.run(whole).state.hash()


def dialled(hosts: Hosts, address: str, port: str) -> str:
    """Return what comes of calling an address from the client's host; "" where it answers."""
    command = [*hosts.inside("client"), sys.executable, "-c", DIAL, address, port]
    return subprocess.run(command, capture_output=True, text=True, env=environment()).stderr
