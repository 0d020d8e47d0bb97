"""Requests meant to hurt: each is refused in OpenAI's shape, nothing of the inside is told, and the server goes on."""

import concurrent.futures
import contextlib
import json
import os
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import BODY_BYTES, TOKEN, Server

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
JSON = {"Content-Type": "application/json"}


def chat(**over: object) -> bytes:
    return json.dumps({"model": "federated", "messages": HELLO} | over).encode()


def plain(**over: object) -> bytes:
    return json.dumps({"model": "base", "prompt": "Once", "max_tokens": 4} | over).encode()


def endless(first: bytes = b'{"model": "', piece: bytes = b"a" * 8192):
    """A chunked body without an end, as far as the server knows."""
    yield first
    for _ in range(4000):
        yield piece


BODIES: dict[str, tuple[str, object, int]] = {
    "huge": (CHAT, b'{"messages": "' + b"a" * 3 * BODY_BYTES + b'"}', 413),
    "endless": (CHAT, endless, 413),
    "empty": (CHAT, b"", 400),
    "not JSON": (CHAT, b"{'model': }", 400),
    "not UTF-8": (CHAT, b'{"model": "\xff\xfe"}', 400),
    "cut short": (CHAT, chat()[:-9], 400),
    "a list": (CHAT, b"[]", 400),
    "null": (CHAT, b"null", 400),
    "deep lists": (CHAT, b"[" * 90_000 + b"]" * 90_000, 400),
    "deep objects": (CHAT, b'{"a":' * 30_000 + b"1" + b"}" * 30_000, 400),
    "many lists": (PLAIN, b'{"model": "base", "prompt": [' + b"[]," * 60_000 + b"[]]}", 400),
    "many messages": (CHAT, b'{"model": "base", "messages": [' + b"{}," * 60_000 + b"{}]}", 400),
    "many options": (CHAT, json.dumps({f"o{i}": 1 for i in range(10_000)}).encode(), 400),
    "NaN": (CHAT, b'{"model": "base", "messages": [], "temperature": NaN}', 400),
    "infinity": (CHAT, chat().replace(b"}]", b'}], "temperature": 1e999'), 400),
    "a lone surrogate": (CHAT, rb'{"model": "\ud800", "messages": []}', 400),
    "an integer without end": (CHAT, b'{"model": "base", "seed": ' + b"9" * 100_000 + b"}", 400),
    "a large integer": (CHAT, chat(seed=10**300), 400),
    "a boolean for a number": (CHAT, chat(max_tokens=True), 400),
    "text for a number": (CHAT, chat(temperature="0.5"), 400),
    "an object for a model": (CHAT, chat(model={"$ne": 1}), 400),
    "no model": (CHAT, json.dumps({"messages": HELLO}).encode(), 400),
    "null messages": (CHAT, chat(messages=None), 400),
    "no messages": (CHAT, chat(messages=[]), 400),
    "a picture": (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400),
    "an unknown role": (CHAT, chat(messages=[{"role": "root", "content": "x"}]), 400),
    "a path": (CHAT, chat(model="../../etc/passwd"), 404),
    "a path of a client": (CHAT, chat(model="client:../../../etc/passwd"), 404),
    "an encoded path": (CHAT, chat(model="%2e%2e%2fetc%2fpasswd"), 404),
    "a null byte": (CHAT, chat(model="base\0.txt"), 404),
    "a long model name": (CHAT, chat(model="m" * 100_000), 404),
    "negative max_tokens": (CHAT, chat(max_tokens=-1), 400),
    "huge max_tokens": (CHAT, chat(max_tokens=10**18), 400),
    "thousands of stop strings": (CHAT, chat(stop=[f"s{i}" for i in range(5000)]), 400),
    "an empty stop string": (CHAT, chat(stop=""), 400),
    "thousands of answers": (CHAT, chat(n=100_000), 400),
    "thousands of prompts": (PLAIN, plain(prompt=["x"] * 5000), 400),
    "a negative token": (PLAIN, plain(prompt=[1, -1]), 400),
    "a token out of range": (PLAIN, plain(prompt=[1, 10**6]), 400),
    "a token beyond 64 bits": (PLAIN, plain(prompt=[2**70]), 400),
    "a fraction of a token": (PLAIN, plain(prompt=[1.5]), 400),
    "an empty prompt": (PLAIN, plain(prompt=""), 400),
    "no prompts": (PLAIN, plain(prompt=[]), 400),
    "an empty list of tokens": (PLAIN, plain(prompt=[[]]), 400),
    "null prompt": (PLAIN, plain(prompt=None), 400),
    "a prompt beyond the positions": (PLAIN, plain(prompt="word " * 30_000), 400),
    "too many log-probabilities": (PLAIN, plain(logprobs=10**6), 400),
}


@pytest.fixture(scope="module", autouse=True)
def unharmed(server: Server, oracle):
    """After everything of this file: the same answer as before, and as much memory as after the first round of it."""
    before = told(server)
    round_of(server)
    settled = server.resident()
    yield
    round_of(server)
    time.sleep(0.2)
    after = server.resident()
    print(f"\nresident memory: {settled / 1024:.0f} MiB after one round, {after / 1024:.0f} MiB after all")
    assert after - settled < 30 * 1024
    assert told(server) == before


def told(server: Server) -> str:
    reply = server.client().chat.completions.create(model="federated", messages=HELLO, temperature=0, max_tokens=20)
    return str(reply.choices[0].message.content)


def round_of(server: Server) -> None:
    with server.http() as http:
        for path, body, _ in BODIES.values():
            send(http, path, body)


def send(http: httpx.Client, path: str, body: object) -> httpx.Response | None:
    """Return the response; None where the server closed the connection on an endless body."""
    try:
        return http.post(path, content=body() if callable(body) else body, headers=JSON)
    except httpx.TransportError:
        assert callable(body), "the server hung up on a plain body"
        return None


def refused(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text[:300]
    assert "Traceback" not in response.text
    assert len(response.content) < 2000
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_cannot_be_answered_is_refused_in_openais_shape(server, name):
    path, body, status = BODIES[name]
    with server.http() as http:
        response = send(http, path, body)
    if response is not None:
        refused(response, status)


@pytest.mark.parametrize(
    "path",
    ["/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/base/../../etc/passwd", "/v1/models/client:%00", "/v1/models/x"],
)
def test_a_model_that_is_a_path_is_no_model(server, path):
    answer = raw(
        server, f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 404")
    assert b'"error"' in answer
    assert b"root:" not in answer


def test_what_has_no_route_or_another_method_is_told_so(server):
    with server.http() as http:
        refused(http.get("/v1/nothing"), 404)
        refused(http.get("/docs"), 404)
        refused(http.get(CHAT), 405)
        refused(http.request("DELETE", "/v1/models/base"), 405)
        refused(http.put(CHAT, content=chat(), headers=JSON), 405)


def test_only_json_is_read(server):
    with server.http() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            refused(http.post(CHAT, content=chat(), headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize(
    "token", ["", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
def test_without_the_token_nothing_is_told(server, token):
    with server.http(Authorization=token) as http:
        error = refused(http.post(CHAT, content=chat(), headers=JSON), 401)
        refused(http.get("/v1/models"), 401)
        refused(http.get("/v1/nothing"), 401)
        assert http.get("/health").json()["status"] == "ok"
    assert TOKEN not in error["message"]


def raw(server: Server, text: str | bytes, wait: float = 5) -> bytes:
    """Send bytes as they are; return what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as line:
        with contextlib.suppress(OSError):
            line.sendall(text.encode() if isinstance(text, str) else text)
        got = b""
        with contextlib.suppress(ConnectionError):
            while more := line.recv(65536):
                got += more
        return got


@pytest.mark.parametrize(
    "text",
    [
        "GET /v1/models HTTP/1.1\r\n" + "".join(f"X-{i}: {'a' * 100}\r\n" for i in range(3000)),
        "GET /" + "a" * 100_000 + " HTTP/1.1\r\nHost: x\r\n\r\n",
        "\x16\x03\x01 hello over TLS\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["many headers", "a long path", "no HTTP", "a negative length", "two lengths", "a chunk without a size"],
)
def test_what_is_not_http_is_answered_and_closed(server, text):
    answer = raw(server, text)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert b"Traceback" not in answer


def test_a_request_that_never_ends_is_given_up(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    assert b" 408 " in raw(server, head, wait=30)  # headers without their end
    assert b" 408 " in raw(server, f"{head}Content-Length: 1000\r\n\r\n{{", wait=30)  # a body without its end


def test_connections_that_say_nothing_do_not_keep_others_out(server):
    with contextlib.ExitStack() as held:
        for _ in range(80):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        answer = raw(server, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503")
        with server.http() as http:
            for _ in range(60):  # body-seconds is 1: then the silent ones are closed
                if (status := http.get("/health").status_code) == 200:
                    break
                time.sleep(0.5)
        assert status == 200


def work(server: Server) -> float:
    """Return the processor seconds that the server has taken: what it did, however busy the machine is."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


LONG: dict[str, object] = {"prompt": "1 2 3 4 5 6", "max_tokens": 900, "temperature": 0}
"""To this the base has no end of answers."""


@pytest.fixture(scope="module")
def whole(server: Server) -> float:
    """The work of one long answer to its last token."""
    before = work(server)
    with server.http() as http:
        used = http.post(PLAIN, content=plain(**LONG), headers=JSON).json()["usage"]
    assert used["completion_tokens"] == LONG["max_tokens"]
    return work(server) - before


def test_thirty_streams_broken_off_at_once_free_the_model(server, whole):
    """All of them together are less work than a quarter of them to the end."""
    body = plain(**LONG, stream=True)

    def leave(number: int) -> None:
        with server.http() as http, http.stream("POST", PLAIN, content=body, headers=JSON) as response:
            assert response.status_code == 200
            for _ in zip(range(2), response.iter_bytes(), strict=False):
                pass

    before = work(server)
    with concurrent.futures.ThreadPoolExecutor(30) as threads:
        list(threads.map(leave, range(30)))
    assert told(server)  # is answered after them
    assert work(server) - before < 30 / 4 * whole
    with server.http() as http:
        assert http.get("/health").json()["waiting"] == 0


def test_clients_that_go_away_before_their_whole_answer_free_the_model(server, whole):
    body = plain(**LONG)
    head = f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    before = work(server)
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert told(server)
    assert work(server) - before < 10 / 4 * whole
