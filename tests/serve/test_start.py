"""How the server starts, waits, refuses and fails, without a model where none is needed."""

import asyncio
import socket
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from sheepfold import cli
from sheepfold import listening as serving
from sheepfold.errors import ConfigError
from sheepfold.serve.app import build
from sheepfold.serve.faults import ApiError
from sheepfold.serve.gate import Gate
from sheepfold.serve.limits import Limits
from sheepfold.serve.queue import ModelQueue

ASK = {"model": "base", "prompt": "Once", "max_tokens": 3}


def asked(*words: str) -> str:
    """Return the error that the command ends with."""
    result = CliRunner().invoke(cli.app, ["serve", *words])
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_a_taken_port_is_one_line_before_any_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        said = asked(str(tmp_path / "no-run"), "--port", str(other.getsockname()[1]))
    assert "address already in use" in said
    assert "--port 0" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_needs_a_token(host, monkeypatch):
    monkeypatch.delenv("SHEEPFOLD_TOKEN", raising=False)
    assert "a token is needed: --token-file FILE, or $SHEEPFOLD_TOKEN" in asked("runs/x", "--host", host, "--port", "0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "no.such.host.invalid"], "give a name or an address of this machine"),
        (["--host", "192.0.2.1", "--port", "0"], "take another address"),
        (["--port", "99999"], "0 to 65535"),
        (["--port", "-1"], "0 to 65535"),
        (["--rows", "0"], "--rows 0: expected 1 or more"),
        (["--seconds", "nan"], "--seconds nan: expected 1 or more"),
        (["--token-file", "no-such-file"], "--token-file no-such-file: No such file"),
    ],
)
def test_words_that_cannot_work_are_one_line(words, said):
    assert said in asked("runs/x", *words)


def test_a_token_is_read_from_its_file_and_must_be_hard_to_guess(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    monkeypatch.setenv("SHEEPFOLD_TOKEN", "fedcba9876543210")
    assert serving.read_token(file) == "0123456789abcdef"
    assert serving.read_token(None) == "fedcba9876543210"
    for weak in ("", "short", "two words of it all", "caf\u00e9" * 8):
        file.write_text(weak)
        with pytest.raises(ConfigError, match="16 or more ASCII characters"):
            serving.read_token(file)


async def through_gate(app, headers: dict[str, str], **gate) -> httpx.Response:
    gated = Gate(app, Limits(), gate.get("token"), gate.get("hosts"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gated), base_url="http://localhost:1") as client:
        return await client.get("/v1/models", headers=headers)


async def ok(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def broken(scope, receive, send):
    raise RuntimeError("a secret of the inside")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
    ],
)
def test_a_page_that_calls_this_machine_by_another_name_is_refused(host, status):
    hosts = serving.hosts_of("127.0.0.1", None)
    response = asyncio.run(through_gate(ok, {"Host": host}, hosts=hosts))
    assert response.status_code == status


def test_a_failure_inside_is_logged_under_an_id_and_told_by_the_id_alone(caplog):
    response = asyncio.run(through_gate(broken, {}))
    assert response.status_code == 500
    assert "secret" not in response.text
    (record,) = caplog.records
    assert record.message.split(":")[0] in response.json()["error"]["message"]
    assert "a secret of the inside" in caplog.text


def steps(stop: threading.Event, taken: list[int]):
    """A model that goes on until it is stopped."""

    def work():
        try:
            for step in range(10_000):
                time.sleep(0.005)
                yield step
        finally:
            taken.append(step)
            stop.set()

    return work


def test_a_full_queue_says_when_to_come_back_and_a_cancelled_job_frees_its_place():
    async def scenario():
        queue, stopped, taken = ModelQueue(waiting=1, seconds=30), threading.Event(), []
        running = queue.admit(steps(stopped, taken))
        pieces = running.pieces()
        assert await anext(pieces) == 0
        waits = queue.admit(lambda: (word for word in ["second"]))
        with pytest.raises(ApiError) as full:
            queue.admit(lambda: (word for word in []))
        assert (full.value.status, int(full.value.headers["retry-after"]) >= 1) == (429, True)
        waits.cancel()
        assert queue.waiting == 0
        other = queue.admit(lambda: (word for word in ["third"]))
        running.cancel()
        assert [piece async for piece in other.pieces()] == ["third"]
        assert stopped.is_set()
        assert taken[0] < 100  # closed after its current step, not at its end
        queue.close()
        queue.join(5)
        with pytest.raises(ApiError, match="stopping"):
            queue.admit(lambda: (word for word in []))

    asyncio.run(scenario())


def test_an_answer_that_takes_too_long_is_given_up_and_an_error_of_the_model_travels():
    async def scenario():
        queue, stopped = ModelQueue(waiting=4, seconds=0.1), threading.Event()
        with pytest.raises(ApiError) as late:
            async for _ in queue.admit(steps(stopped, [])).pieces():
                pass
        assert (late.value.status, late.value.code) == (504, "timeout")
        await asyncio.to_thread(stopped.wait, 5)

        def fails():
            yield 1
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            async for _ in queue.admit(fails).pieces():
                pass
        queue.close()

    asyncio.run(scenario())


def test_a_model_that_fails_is_a_500_with_an_id_whole_and_streamed(oracle, monkeypatch, caplog):
    def fails(*_: object, **__: object):
        raise RuntimeError("a secret of the inside")
        yield

    monkeypatch.setattr(oracle, "stream", fails)

    async def scenario():
        app = build(oracle, Limits())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return [await client.post("/v1/completions", json=ASK | {"stream": stream}) for stream in (False, True)]

    for response in asyncio.run(scenario()):
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["error"]["message"].split()[-1] in caplog.text
