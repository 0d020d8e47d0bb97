"""A server that is killed, renewed, enrolled at and stopped, with real processes."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sheepfold.flower import certs, jobs, keys, registry
from sheepfold.flower.fold import read_json
from sheepfold.locks import is_locked
from tests.network import servers
from tests.network.federation import CLIENT, Process, end, started, write_rows
from tests.network.servers import SHEEPFOLD, Server, children_of, environment, is_alive, until
from tests.runs import experiment

pytestmark = pytest.mark.network


def sheepfold(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command, and return what came of it."""
    return subprocess.run([*SHEEPFOLD, *words], capture_output=True, text=True, env=environment(), timeout=60)


def node_said(folder: Path) -> str:
    return (folder / "node.log").read_text()


def join(folder: Path, server: Server, name: str) -> "subprocess.Popen[bytes]":
    """Start a SuperNode with an enrolled key, and wait until it has joined."""
    key = server.fold.path.parent / "keys" / f"{name}.key"
    words = ["--root-certificates", str(server.fold.ca), "--auth-supernode-private-key", str(key)]
    node = servers.supernode(folder, server.address, *words)
    until(lambda: "SuperNode ID" in node_said(folder), what="the node's joining")
    return node


@contextmanager
def client(home: Path, server: Server, name: str) -> Iterator[Process]:
    """A client's machine as people start it, from when it is connected: it sees to its SuperNode."""
    home.mkdir()
    write_rows(home / "rows.jsonl", [{"instruction": "Say yes.", "output": "Yes."}])
    key = server.fold.path.parent / "keys" / f"{name}.key"
    paths = {"ca": str(server.fold.ca), "key": str(key), "data": "rows.jsonl", "folder": "kept"}
    node = servers.write_node(home / "node.yaml", {"name": name, "server": server.address, **paths})
    process = started([*CLIENT, str(node)], home, home / "client.log")
    try:
        until(lambda: "connected to" in (home / "client.log").read_text(), what="the client's joining")
        yield process
    finally:
        end(process)


def calls_again(server: Server, name: str) -> None:
    """Wait until a client has called since now."""

    def sent() -> int:
        return int((read_json(server.fold.traffic) or {}).get(name, {}).get("up", 0))

    before = sent()
    until(lambda: sent() > before, what=f"a call of {name}'s")


def answers(server: Server) -> bool:
    """Return whether the SuperLink answers through the proxy."""
    try:
        with server.client() as client:
            return client.get("/health").status_code == 200
    except OSError:
        return False


def test_a_server_says_who_it_is_and_refuses_a_second_one(server: Server) -> None:
    ca = certs.read(server.fold)[0]
    assert f"listening on {server.address}" in server.said
    assert ca.fingerprint in server.said
    assert "enrolled: ward-7, lab, clinic" in server.said
    second = sheepfold("server", "--fold", str(server.fold.path), "--port", "0")
    assert second.returncode == 2
    assert "a server runs here already" in second.stderr
    assert len(second.stderr.splitlines()) == 1


def test_a_taken_port_is_refused_before_anything_starts(server: Server, tmp_path: Path) -> None:
    other = servers.make_fold(tmp_path, ())
    port = server.address.rpartition(":")[2]
    second = sheepfold("server", "--fold", str(other.path), "--host", "127.0.0.1", "--port", port)
    assert second.returncode == 2
    assert "address already in use" in second.stderr
    assert not other.logs.exists()


def test_status_sees_a_running_server(server: Server) -> None:
    said = sheepfold("status", "--fold", str(server.fold.path))
    assert said.returncode == 0, said.stderr
    assert f"running on {server.address}" in said.stdout
    assert "clinic" in said.stdout


def test_a_client_enrolled_while_the_server_runs_may_come_and_one_struck_off_must_go(
    own_server: Server, tmp_path: Path
) -> None:
    server, made = own_server, tmp_path / "keys"
    keys.make(made / "new.key", made / "new.pub", "new")
    done = sheepfold("enroll", str(made / "new.pub"), "--name", "new", "--fold", str(server.fold.path))
    assert done.returncode == 0, done.stderr
    until(lambda: registry.nodes(server.fold)["new"].node_id is not None, what="the registration")
    node = join(tmp_path / "node", server, "new")
    try:
        assert sheepfold("enroll", "--name", "new", "--remove", "--fold", str(server.fold.path)).returncode == 0
        node.wait(30)
    finally:
        node.kill()
    again = sheepfold("enroll", str(made / "new.pub"), "--name", "new", "--fold", str(server.fold.path))
    assert again.returncode == 2
    assert "removed before" in again.stderr


def test_processes_that_are_killed_come_back_and_a_client_stays(own_server: Server, tmp_path: Path) -> None:
    server = own_server
    with client(tmp_path / "lab", server, "lab") as lab:
        for name in ("superlink", "superexec", "proxy"):
            before = server.child(name)
            os.kill(before, signal.SIGKILL)
            until(lambda name=name, before=before: server.child(name) != before, what=f"{name}'s return")  # type: ignore[misc]
            until(lambda: answers(server), what=f"the answer after {name} was killed")
        calls_again(server, "lab")
        assert lab.poll() is None


def test_a_server_that_is_killed_takes_its_processes_along_and_goes_on_where_it_was(
    own_server: Server, tmp_path: Path
) -> None:
    server, before = own_server, own_server.address
    with client(tmp_path / "lab", server, "lab") as lab:
        assert server.process is not None
        children = children_of(server.process.pid, "")
        assert len(children) == 3
        server.kill()
        until(lambda: not any(is_alive(pid) for pid in children), what="the children's end")
        assert not is_locked(server.fold.lock)
        server.start()
        assert server.address == before
        calls_again(server, "lab")
        assert lab.poll() is None


def test_a_server_ends_in_good_order(own_server: Server) -> None:
    assert own_server.process is not None
    children = children_of(own_server.process.pid, "")
    began = time.monotonic()
    assert own_server.stop() == 0
    assert time.monotonic() - began < 15
    assert not any(is_alive(pid) for pid in children)
    assert "Traceback" not in own_server.said
    assert "resumes when the server is started again" in own_server.said
    assert "not running" in sheepfold("status", "--fold", str(own_server.fold.path)).stdout


def test_a_renewed_certificate_is_taken_up_by_a_running_server(own_server: Server) -> None:
    server = own_server

    def shown() -> bytes | None:
        try:
            host, port = server.address.split(":")
            context = ssl.create_default_context(cafile=str(server.fold.ca))
            with (
                socket.create_connection((host, int(port)), timeout=5) as plain,
                context.wrap_socket(plain, server_hostname=host) as wrapped,
            ):
                return wrapped.getpeercert(True)
        except OSError:
            return None

    before = shown()
    assert before is not None
    done = sheepfold("certs", str(server.fold.path), "--renew")
    assert done.returncode == 0, done.stderr
    until(lambda: shown() not in (before, None), what="the new certificate")
    until(lambda: answers(server), what="an answer with the new certificate")


def test_flowers_database_may_be_lost_and_nodes_are_registered_anew(own_server: Server) -> None:
    server = own_server
    before = registry.nodes(server.fold)["lab"].node_id
    server.stop()
    for path in server.fold.path.glob("superlink.db*"):
        path.unlink()
    shutil.rmtree(server.fold.home)
    server.start()
    assert registry.nodes(server.fold)["lab"].node_id not in (before, None)


def test_jobs_are_stopped_failed_and_their_coordinators_replaced(own_server: Server, tmp_path: Path) -> None:
    """With no client there, a coordinator waits for ever: time enough to kill it."""
    fold = own_server.fold
    job = jobs.submit(fold, experiment(tmp_path).model_dump(mode="json"))
    waiting = jobs.submit(fold, {"name": "later"})
    jobs.ask_to_stop(waiting)
    wrong = jobs.submit(fold, {"no": "experiment"})
    until(lambda: jobs.is_worked_on(job), 60, "the coordinator")
    first = until(lambda: jobs.status(job).pid, what="its number")
    os.kill(first, signal.SIGKILL)
    until(lambda: jobs.status(job).pid not in (None, first) and jobs.is_worked_on(job), 60, "another coordinator")
    assert jobs.status(job).attempts == 2
    assert jobs.status(waiting).state == "waiting"
    assert sheepfold("stop", job.id, "--fold", str(fold.path)).returncode == 0
    until(lambda: jobs.status(job).state == "stopped", 60, "the stop")
    until(lambda: jobs.status(waiting).state == "stopped", what="the stop of the one that waits")
    assert jobs.status(waiting).attempts == 0
    until(lambda: jobs.status(wrong).over, 60, "the end of what is no experiment")
    assert jobs.status(wrong).state == "failed"
    assert "no" in jobs.status(wrong).reason
    said = sheepfold("status", "--fold", str(fold.path)).stdout
    assert [state for state in ("stopped", "failed") if state not in said] == []
