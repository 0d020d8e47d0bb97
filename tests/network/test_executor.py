"""A client's machine: who is let in and who is told why not, and what it does when one of its processes dies."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.flower import client, keys
from sheepfold.flower.heartbeat import Heartbeat, Unreachable
from sheepfold.node.settings import NodeSettings, read_node
from tests.network.federation import CLIENT, Federation, below
from tests.network.servers import environment, make_fold, until

pytestmark = pytest.mark.network
ROW = [{"instruction": "Say yes.", "output": "Yes."}]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("federation"), ["ann", "bob"]) as made:
        made.server.start()
        yield made


def refused(node: Path) -> str:
    """Return the one line with which a client that is not wanted ends."""
    ended = subprocess.run(
        [*CLIENT, str(node)], cwd=node.parent, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def heartbeat(node: Path) -> Heartbeat:
    return Heartbeat(read_node(node))


def called(federation: Federation, name: str) -> Heartbeat:
    """Return what ann says under another name."""
    node = federation.node("ann", ROW)
    node.write_text(node.read_text().replace("name: ann", f"name: {name}"))
    return heartbeat(node)


def test_a_certificate_of_another_authority_is_not_trusted(federation: Federation, tmp_path: Path) -> None:
    other = make_fold(tmp_path, [])
    said = refused(federation.node("ann", ROW, ca=str(other.ca)))
    assert f"ca {other.ca}" in said
    assert "is not to be trusted" in said


def test_a_key_that_is_not_enrolled_is_refused(federation: Federation, tmp_path: Path) -> None:
    keys.make(tmp_path / "key", tmp_path / "key.pub", "stranger")
    said = refused(federation.node("ann", ROW, key=str(tmp_path / "key")))
    assert "the signature is not by the key that ann enrolled with" in said


def test_a_name_that_is_not_enrolled_is_refused(federation: Federation) -> None:
    with pytest.raises(ConfigError, match=r"'zoe' is not enrolled here; `sheepfold enroll PUBKEY --name zoe`"):
        called(federation, "zoe").knock()


def test_another_client_s_name_is_refused(federation: Federation) -> None:
    with pytest.raises(ConfigError, match="not by the key that bob enrolled with"):
        called(federation, "bob").knock()


def test_a_server_by_another_name_than_its_certificate_s_is_not_trusted(federation: Federation) -> None:
    port = federation.server.address.rpartition(":")[2]
    with pytest.raises(ConfigError, match="is not to be trusted"):
        heartbeat(federation.node("ann", ROW, server=f"{socket.gethostname()}:{port}")).knock()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_a_port_without_tls_is_told_so(federation: Federation, greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            caller, _ = plain.accept()
            caller.recv(4096)
            caller.sendall(greeting)
            caller.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConfigError, match="does not speak TLS"):
            heartbeat(federation.node("ann", ROW, server=f"localhost:{plain.getsockname()[1]}")).knock()


def test_a_server_that_is_away_is_knocked_at_again(federation: Federation) -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        heartbeat(federation.node("ann", ROW, server="localhost:9")).knock()


def test_a_private_key_that_is_none_is_told_before_anything_is_dialled(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("nonsense")
    with pytest.raises(ConfigError, match="no private key in OpenSSH's format"):
        heartbeat(federation.node("ann", ROW, key=str(tmp_path / "key")))


def test_a_second_client_in_one_folder_is_refused(federation: Federation) -> None:
    node = federation.node("ann", ROW)
    federation.join("ann")
    federation.there(["ann"])
    with pytest.raises(CheckpointError, match="another client is at work here"):
        client.run(read_node(node), print)


def test_a_second_machine_with_the_same_key_is_refused_and_the_first_goes_on(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.node("ann", ROW)
    if "ann" not in federation.clients:
        federation.join("ann")
    federation.there(["ann"])
    session = federation.sessions()["ann"]
    monkeypatch.setattr(client, "HELD_S", 3.0)
    elsewhere: NodeSettings = read_node(federation.node("ann", ROW, folder=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="another machine is connected with it"):
        client.run(elsewhere, print)
    assert federation.sessions()["ann"] == session


@pytest.mark.parametrize("word", ["flower-supernode", "flower.executor"])
def test_a_client_whose_process_is_killed_is_back_in_a_new_session(federation: Federation, word: str) -> None:
    federation.node("bob", ROW)
    if "bob" not in federation.clients:
        federation.join("bob")
    federation.there(["bob"])
    before = federation.sessions()["bob"]
    [victim] = below(federation.clients["bob"], word)
    victim.kill()
    until(lambda: federation.sessions()["bob"] != before, 45, "bob to be back")  # Flower alone would take a minute


def test_a_client_that_is_killed_takes_its_processes_along_and_is_back_when_started_again(
    federation: Federation,
) -> None:
    federation.node("bob", ROW)
    if "bob" not in federation.clients:
        federation.join("bob")
    federation.there(["bob"])
    before, family = federation.sessions()["bob"], list(below(federation.clients["bob"], "flower"))
    assert len(family) >= 2
    federation.clients["bob"].kill()
    federation.clients["bob"].wait()
    until(lambda: not any(process.is_running() for process in family), 10, "its processes to end")
    federation.join("bob")
    until(lambda: federation.sessions()["bob"] != before, 45, "bob to be back")


def test_a_client_ends_quietly_when_asked(federation: Federation) -> None:
    federation.node("bob", ROW)
    if "bob" not in federation.clients:
        federation.join("bob")
    federation.there(["bob"])
    process: Any = federation.clients.pop("bob")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 0
