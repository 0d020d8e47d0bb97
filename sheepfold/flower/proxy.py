"""The one door of a server: TLS outside, and behind it nothing but nodes' own calls.

    node ── TLS ──▶ POST /v1/fleet/<call>, signed by an enrolled key ──▶ SuperLink on loopback
                    POST /alive, signed                              ──▶ seen/<name>.json
                    GET  /health                                     ──▶ SuperLink
                    anything else                                    ──▶ 403

Bodies pass through piece by piece, in both directions; only the small ones that may be told again (redelivery.py) are
held whole. It is a process of its own:
`python -m sheepfold.flower.proxy FOLD DESCRIPTOR`, with the socket that its supervisor bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from sheepfold.errors import SheepfoldError, WireError
from sheepfold.flower import alive, superlink
from sheepfold.flower.fold import Fold, glance
from sheepfold.flower.gate import FLEET, Enrolled, Refusal, caller, forwarded, one
from sheepfold.flower.redelivery import LARGEST, ONCE, Call, Redelivery
from sheepfold.serve.connections import HEADER_BYTES, protocol
from sheepfold.serve.limits import Limits

LARGEST_BODY = 16 * 2**20
"""Bytes of one request; Flower cuts what it sends into objects of 5 MB"""
LIMITS = Limits(body_seconds=20, connections=400)
PIECE_S = 30.0
"""Longest wait for a further piece of a request"""
WHOLE_S = 900.0
"""Longest time for a whole request"""
UPSTREAM = httpx.Timeout(60.0, connect=5.0, pool=10.0)
KEPT_S = 3.0
"""Seconds that an idle connection to the SuperLink is kept; it closes them after 5"""
COUNTED_EVERY_S = 2.0
MOST_CALLS = 40
"""Of one client at a time; a SuperNode makes a dozen, and one that makes hundreds would leave the others none"""
PASSED_BACK = {b"content-type", b"content-length", b"content-encoding", b"retry-after"}

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Proxy:
    """The application that uvicorn serves."""

    def __init__(self, fold: Fold, link: superlink.Superlink) -> None:
        self.fold, self.enrolled = fold, Enrolled.of(fold)
        self.last = {path.stem: float((glance(path) or {}).get("signed_at", 0)) for path in _seen(fold)}
        self.traffic: dict[str, dict[str, int]] = glance(fold.traffic) or {}
        self.redelivery = Redelivery()
        self.calls: Counter[str] = Counter()
        self.upstream = httpx.AsyncClient(
            base_url=f"https://{link.address}",
            verify=_trust(fold),
            timeout=UPSTREAM,
            limits=httpx.Limits(max_connections=200, max_keepalive_connections=20, keepalive_expiry=KEPT_S),
            follow_redirects=False,
            trust_env=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        try:
            await self._answer(scope, receive, send)
        except Refusal as refusal:
            await _say(send, refusal.status, {"error": refusal.why})
        except SheepfoldError as error:
            logging.getLogger("sheepfold").error("%s", error)
            await _say(send, 500, {"error": "the server cannot tell who is enrolled; its log says why"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path, headers = scope["method"], scope["raw_path"], list(scope["headers"])
        if sum(len(k) + len(v) for k, v in headers) > HEADER_BYTES:
            raise Refusal(431, f"headers of more than {HEADER_BYTES} bytes")
        asked = (method, path if not scope["query_string"] else b"")
        self.enrolled.refresh()
        if asked == ("POST", alive.PATH.encode()):
            return await self._heard(headers, receive, send)
        if asked == ("GET", b"/health"):
            return await self._pass("GET", "/health", None, [], None, send)
        if asked[0] == "POST" and FLEET.fullmatch(asked[1]):
            name = caller(headers, self.enrolled)
            with self._one_more(name):
                return await self._called(name, path.decode(), headers, receive, send)
        raise Refusal(403, "not open to nodes")

    async def _heard(self, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send) -> None:
        """Take a heartbeat."""
        signature = one(headers, alive.HEADER.encode()).decode("latin-1")
        body = b"".join([piece async for piece in _pieces(receive, alive.LARGEST)])
        try:
            beat = alive.check(body, signature, self.enrolled.keys, time.time(), self.last)
        except WireError as error:
            raise Refusal(403, str(error)) from None
        if beat.session:
            self.last[beat.name] = beat.at
            said = {"at": time.time(), "signed_at": beat.at, "session": beat.session, "state": dict(beat.state)}
            _write(self.fold.seen / f"{beat.name}.json", said)
        await _say(send, 200, {"ok": True})

    @contextlib.contextmanager
    def _one_more(self, name: str) -> Iterator[None]:
        """Count a call of a client's while it is answered. Raises Refusal (503) where it has too many."""
        if self.calls[name] >= MOST_CALLS:
            raise Refusal(503, f"{name} has {MOST_CALLS} calls open; let one end")
        self.calls[name] += 1
        try:
            yield
        finally:
            self.calls[name] -= 1

    async def _called(
        self, name: str, path: str, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send
    ) -> None:
        """Answer a node's call; one that is repeated since its answer was lost is told the same again."""
        most = LARGEST if path in ONCE else LARGEST_BODY
        if any(int(v) > most for k, v in headers if k == b"content-length"):
            raise Refusal(413, f"a request of more than {most} bytes")
        content = self._counted(name, "up", _pieces(receive, most))
        call = (path, b"".join([piece async for piece in content]) if path in ONCE else b"")
        if given := self.redelivery.again(name, call):
            self.traffic[name]["down"] += len(given.body)
            await send({"type": "http.response.start", "status": 200, "headers": given.headers})
            await send({"type": "http.response.body", "body": given.body})
        elif path in ONCE:
            await self._pass("POST", path, name, headers, call[1], send, call)
        else:
            await self._pass("POST", path, name, headers, content, send)

    async def _pass(
        self,
        method: str,
        path: str,
        name: str | None,
        headers: list[tuple[bytes, bytes]],
        content: bytes | AsyncIterator[bytes] | None,
        send: Send,
        kept: Call | None = None,
    ) -> None:
        """Hand a request on and its answer back, counting it under a client's name; kept: it may be told again."""
        request = self.upstream.build_request(method, path, headers=forwarded(headers), content=content)
        try:
            answer = await self.upstream.send(request, stream=True)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Refusal(503, f"the SuperLink does not answer ({type(error).__name__}); try again") from None
        try:
            back = [(k, v) for k, v in answer.headers.raw if _goes_back(k.lower())]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": back})
            pieces = answer.aiter_raw()
            if name is not None and kept is not None and answer.status_code == 200:
                pieces = self.redelivery.kept(name, kept, back, pieces)
            async for piece in self._counted(name, "down", pieces):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (
            httpx.TransportError
        ) as error:  # an answer that stops in the middle: so does ours, and the node asks again
            logging.getLogger("sheepfold").warning("%s: the SuperLink broke off (%s)", path, type(error).__name__)
        finally:
            await answer.aclose()

    async def _counted(self, name: str | None, way: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in pieces:
            if name is not None:
                self.traffic.setdefault(name, {"up": 0, "down": 0})[way] += len(piece)
            yield piece

    async def write_traffic(self) -> None:
        """Write the counted bytes down now and then, for `sheepfold status`."""
        written = ""
        while True:
            if (now := json.dumps(self.traffic)) != written:
                _write(self.fold.traffic, self.traffic)
                written = now
            await asyncio.sleep(COUNTED_EVERY_S)


async def serve(fold: Fold, taken: socket.socket) -> None:
    """Answer on a bound socket until a signal."""
    proxy = Proxy(fold, superlink.running(fold))
    config = uvicorn.Config(
        proxy,
        http=protocol(LIMITS),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=3,
        backlog=512,
        ssl_certfile=fold.certificate,
        ssl_keyfile=fold.key,
    )
    counting = asyncio.create_task(proxy.write_traffic())
    try:
        await uvicorn.Server(config).serve(sockets=[taken])
    finally:
        counting.cancel()
        _write(fold.traffic, proxy.traffic)
        await proxy.upstream.aclose()


async def _pieces(receive: Receive, most: int) -> AsyncIterator[bytes]:
    """Yield a request's body as it comes. Raises Refusal for one too large, too slow, or cut off."""
    size, until = 0, time.monotonic() + WHOLE_S
    while True:
        try:
            event = await asyncio.wait_for(receive(), min(PIECE_S, max(0.1, until - time.monotonic())))
        except TimeoutError:
            raise Refusal(408, "the request did not arrive in time") from None
        if event["type"] == "http.disconnect":
            raise Refusal(400, "the request was cut off")
        size += len(event["body"])
        if size > most:
            raise Refusal(413, f"a request of more than {most} bytes")
        if event["body"]:
            yield event["body"]
        if not event.get("more_body"):
            return


async def _say(send: Send, status: int, value: dict[str, Any]) -> None:
    """Answer with a line of JSON; a refusal closes the connection, so that a body nobody reads is not sent."""
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status >= 400:
        headers.append((b"connection", b"close"))
    with contextlib.suppress(RuntimeError):  # an answer had begun: the connection ends with it
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _goes_back(header: bytes) -> bool:
    return header in PASSED_BACK or header.startswith(b"flwr-")


def _trust(fold: Fold) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(fold.ca))


def _seen(fold: Fold) -> list[Path]:
    return sorted(fold.seen.glob("*.json"))


def _write(path: Path, value: Any) -> None:
    """Replace a small file; what is written every two seconds need not survive a power cut."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Serve FOLD on the socket that is open as DESCRIPTOR."""
    fold, descriptor = sys.argv[1:]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(serve(Fold(Path(fold)), socket.socket(fileno=int(descriptor))))


if __name__ == "__main__":
    main()
