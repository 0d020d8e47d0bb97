"""Nobody passes the fence who is not enrolled, and who is passes to the fleet's calls alone."""

import base64
import contextlib
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from sheepfold.flower import alive, keys
from sheepfold.flower.alive import Beat
from sheepfold.flower.fold import read_json
from tests.network import servers
from tests.network.servers import Server

pytestmark = pytest.mark.network

CONTROL = ["start-run", "stop-run", "register-node", "unregister-node", "list-nodes", "list-runs", "add-app"]
RUNTIME = ["acquire-task", "pull-task-input", "push-task-output", "push-messages", "create-task", "responses"]
HIDDEN = [f"/v1/control/{call}" for call in CONTROL] + [f"/v1/runtime/{call}" for call in RUNTIME]
TRICKS = [
    "//v1/control/{0}",
    "/v1//control/{0}",
    "/v1/fleet/../control/{0}",
    "/v1/fleet/..%2fcontrol/{0}",
    "/v1/fleet/%2e%2e/control/{0}",
    "/v1/fleet/%2e%2e%2fcontrol%2f{0}",
    "/v1/fleet/..;/control/{0}",
    "/v1/fleet/..\\control\\{0}",
    "/v1/%63ontrol/{0}",
    "/v1/Control/{0}",
    "/health/../v1/control/{0}",
    "/health?/v1/control/{0}",
    "/alive/../v1/control/{0}",
    "/v1/fleet/pull-messages/../../control/{0}",
    "/v1/fleet/pull-messages%00/v1/control/{0}",
    "/v1/fleet//../control/{0}",
    "/v1/control/{0}#/v1/fleet/pull-messages",
    "/v1/control/{0}?/v1/fleet/",
    "/v1/fleet/",
    "/v1/fleet",
    "/docs",
    "/openapi.json",
    "*",
]


def _keys(server: Server) -> Path:
    return server.fold.path.parent / "keys"


def _signed(private: Path) -> dict[str, str]:
    """Return the headers that Flower's SuperNode sends with each call."""
    from flwr.supercore.date import now

    key = keys.private_key(private)
    said = now().isoformat()
    from flwr.supercore.primitives.asymmetric import sign_message

    pem = keys.public_pem(key.public_key())
    return {
        "flwr-public-key": base64.b64encode(pem).decode(),
        "flwr-timestamp": said,
        "flwr-signature": base64.b64encode(sign_message(key, said.encode())).decode(),
    }


def _raw(server: Server, request: bytes) -> bytes:
    """Send bytes over TLS as they are, and return the first of what comes back."""
    host, port = server.address.split(":")
    context = ssl.create_default_context(cafile=str(server.fold.ca))
    with (
        socket.create_connection((host, int(port)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        wrapped.sendall(request)
        return wrapped.recv(4096)


def _post(server: Server, path: str, headers: dict[str, str], body: bytes = b"") -> int:
    """POST to a path exactly as spelled; returns the status."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
    lines += ["content-type: application/protobuf", *(f"{k}: {v}" for k, v in headers.items())]
    answer = _raw(server, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    return int(answer.split(b" ", 2)[1])


def _try_to_join(folder: Path, server: Server, *words: str) -> str:
    """Return what a SuperNode says until it gives up; fails where it joins, or does not give up."""
    node = servers.supernode(folder, server.address, *words)
    try:
        node.wait(30)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still trying: {(folder / 'node.log').read_text()}")
    finally:
        node.kill()
    log = (folder / "node.log").read_text()
    assert "SuperNode ID" not in log
    return log


def test_control_and_runtime_are_closed_however_they_are_spelled(server: Server) -> None:
    node = _signed(_keys(server) / "ward-7.key")
    for path in HIDDEN:
        assert _post(server, path, {}) == 403, path
        assert _post(server, path, node) == 403, path
    for trick in TRICKS:
        for call in ("start-run", "register-node"):
            path = trick.format(call)
            assert _post(server, path, node) in (400, 403), path


def test_whole_urls_other_methods_and_second_requests_open_nothing(server: Server) -> None:
    node = "".join(f"{k}: {v}\r\n" for k, v in _signed(_keys(server) / "ward-7.key").items())
    for target in ("https://localhost/v1/control/start-run", f"https://{server.superlink}/v1/control/start-run"):
        assert _raw(server, f"POST {target} HTTP/1.1\r\nhost: x\r\n{node}content-length: 0\r\n\r\n".encode())[9:12] in (
            b"400",
            b"403",
        )
    with server.client() as client:
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            assert client.request(method, "/v1/fleet/pull-messages").status_code == 403
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    both = f"content-length: {len(hidden)}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".encode()
    assert b" 200 " not in _raw(
        server, f"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n{node}".encode() + both + hidden
    )


def test_health_is_open(server: Server) -> None:
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_an_enrolled_key_passes_to_the_fleet(server: Server) -> None:
    """What the refusals below are measured against: Flower itself answers, and knows no such message."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest

    key = keys.private_key(_keys(server) / "lab.key")
    body = ActivateNodeRequest(public_key=keys.public_pem(key.public_key()), heartbeat_interval=30).SerializeToString()
    assert _post(server, "/v1/fleet/activate-node", _signed(_keys(server) / "lab.key"), body) == 200


def test_calls_without_a_key_or_with_a_strangers_are_refused(server: Server, tmp_path: Path) -> None:
    keys.make(tmp_path / "x.key", tmp_path / "x.pub", "x")
    own, stranger = _signed(_keys(server) / "ward-7.key"), _signed(tmp_path / "x.key")
    assert _post(server, "/v1/fleet/pull-messages", {}) == 401
    assert _post(server, "/v1/fleet/register-node", stranger) == 401
    assert _post(server, "/v1/fleet/activate-node", stranger) == 401
    mixed = {**own, "flwr-signature": stranger["flwr-signature"]}
    assert _post(server, "/v1/fleet/pull-messages", mixed) == 401
    old = {**own, "flwr-timestamp": "2026-01-01T00:00:00+00:00"}
    assert _post(server, "/v1/fleet/pull-messages", old) == 401
    for broken in ("", "never", "2026-01-01", "9" * 40):
        assert _post(server, "/v1/fleet/pull-messages", {**own, "flwr-timestamp": broken}) == 401


def test_one_client_cannot_speak_for_another(server: Server) -> None:
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    other = read_json(server.fold.nodes)["lab"]["node_id"]  # type: ignore[index]
    body = PullMessagesRequest(node=Node(node_id=other)).SerializeToString()
    assert _post(server, "/v1/fleet/pull-messages", _signed(_keys(server) / "ward-7.key"), body) == 401


def test_a_supernode_without_a_key_or_with_a_strangers_gives_up(server: Server, tmp_path: Path) -> None:
    """With the CA's certificate alone, as a thief of it would have."""
    ca = ["--root-certificates", str(server.fold.ca)]
    keys.make(tmp_path / "x.key", tmp_path / "x.pub", "x")
    _try_to_join(tmp_path / "none", server, *ca)
    _try_to_join(tmp_path / "other", server, *ca, "--auth-supernode-private-key", str(tmp_path / "x.key"))


def test_a_supernode_with_another_ca_gives_up(server: Server, tmp_path: Path) -> None:
    wrong = servers.make_fold(tmp_path, ())
    key = ["--auth-supernode-private-key", str(_keys(server) / "clinic.key")]
    log = _try_to_join(tmp_path / "node", server, "--root-certificates", str(wrong.ca), *key)
    assert "certificate verify failed" in log.lower()


def test_a_key_in_use_lets_no_second_node_in(server: Server, tmp_path: Path) -> None:
    words = ["--root-certificates", str(server.fold.ca)]
    words += ["--auth-supernode-private-key", str(_keys(server) / "clinic.key")]
    first = servers.supernode(tmp_path / "first", server.address, *words)
    try:
        servers.until(lambda: "SuperNode ID" in (tmp_path / "first" / "node.log").read_text(), what="the first node")
        _try_to_join(tmp_path / "second", server, *words)
        assert first.poll() is None
    finally:
        first.terminate()
        first.wait(20)


def test_plain_http_is_refused(server: Server) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{server.address}/health", timeout=5)
    with pytest.raises(httpx.TransportError):  # the SuperLink's own door is on loopback alone, and TLS too
        httpx.get(f"http://{server.superlink}/health", timeout=5)


def test_an_executor_without_the_secret_gets_no_task(server: Server) -> None:
    from flwr.proto.runtime_pb2 import AcquireTaskRequest

    body = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString()
    headers = {"content-type": "application/protobuf"}
    trust = ssl.create_default_context(cafile=str(server.fold.ca))
    url = f"https://{server.superlink}/v1/runtime/acquire-task"
    assert httpx.post(url, content=body, headers=headers, verify=trust).status_code == 401


def test_bodies_too_large_and_headers_too_long_are_refused(server: Server) -> None:
    node = _signed(_keys(server) / "ward-7.key")
    told = "".join(f"{k}: {v}\r\n" for k, v in node.items())
    start = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n{told}"
    assert b" 413 " in _raw(server, f"{start}content-length: {10**10}\r\n\r\n".encode())
    with server.client() as client:
        answer = client.post("/v1/fleet/push-object", headers=node, content=(b"x" * 2**20 for _ in range(20)))
        assert answer.status_code == 413
    assert b" 431 " in _raw(server, f"{start}x: {'y' * 70_000}\r\n\r\n".encode())
    with contextlib.suppress(OSError):  # closed before it was all read
        assert b" 400 " in _raw(server, f"{start}x: {'y' * 3_000_000}\r\n\r\n".encode())


def test_a_client_that_never_ends_its_headers_is_let_go(server: Server) -> None:
    host, port = server.address.split(":")
    context = ssl.create_default_context(cafile=str(server.fold.ca))
    began = time.monotonic()
    with (
        socket.create_connection((host, int(port)), timeout=40) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        wrapped.sendall(b"POST /alive HTTP/1.1\r\nhost: x\r\nx-slow: ")
        assert b" 408 " in wrapped.recv(4096)
    assert time.monotonic() - began < 30


def test_a_heartbeat_is_kept_and_a_knock_is_not(server: Server) -> None:
    kept = server.fold.seen / "lab.json"
    assert _beat(server, "lab", Beat("lab", "", time.time())) == 200
    assert not kept.exists()
    assert _beat(server, "lab", Beat("lab", "s1", time.time(), {"doing": "waiting"})) == 200
    found = read_json(kept)
    assert found is not None
    assert found["session"] == "s1"
    assert found["state"] == {"doing": "waiting"}
    assert abs(found["at"] - time.time()) < 5


def test_heartbeats_of_others_and_of_other_times_are_refused(server: Server, tmp_path: Path) -> None:
    keys.make(tmp_path / "x.key", tmp_path / "x.pub", "x")
    now = time.time()
    assert _beat(server, "ward-7", Beat("lab", "s", now)) == 403  # another's name, signed with one's own key
    assert _beat(server, "ward-7", Beat("nobody", "s", now)) == 403
    assert _beat(server, "ward-7", Beat("ward-7", "s", now - 1000)) == 403
    assert _beat(server, "ward-7", Beat("ward-7", "s", now + 1000)) == 403
    assert _beat(server, tmp_path / "x.key", Beat("ward-7", "s", now)) == 403
    beat = Beat("ward-7", "s", now)
    assert _beat(server, "ward-7", beat) == 200
    assert _beat(server, "ward-7", beat) == 403  # sent again
    assert _beat(server, "ward-7", Beat("ward-7", "s", now - 1)) == 403
    body, signature = alive.sign(Beat("ward-7", "s", now + 1), keys.private_key(_keys(server) / "ward-7.key"))
    with server.client() as client:
        changed = body.replace(b'"s"', b'"t"')
        assert client.post("/alive", content=changed, headers={alive.HEADER: signature}).status_code == 403
        assert client.post("/alive", content=body).status_code == 401
        large = client.post("/alive", content=b"x" * 20_000, headers={alive.HEADER: signature})
        assert large.status_code == 413
        for junk in (b"", b"[]", b"{}", b"\xff", b'{"name": 1, "session": 2, "at": 3, "state": 4}', b"[" * 10_000):
            assert client.post("/alive", content=junk, headers={alive.HEADER: signature}).status_code == 403


def _beat(server: Server, key: str | Path, beat: Beat) -> int:
    """Send a heartbeat signed with a key; returns the status."""
    private = key if isinstance(key, Path) else _keys(server) / f"{key}.key"
    body, signature = alive.sign(beat, keys.private_key(private))
    with server.client() as client:
        return client.post("/alive", content=body, headers={alive.HEADER: signature}).status_code
