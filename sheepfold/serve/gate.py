"""What stands before the routes: the Host header or the token, the body within its bounds, and the last catch.

scope ─ host ─ token ─ body (counted while it is read) ─▶ routes ─▶ 500 with an id where they fail
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sheepfold.listening import called
from sheepfold.serve.faults import ApiError, internal, shown
from sheepfold.serve.limits import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("sheepfold.serve")
LINGER = 1.0
"""Seconds for which a refused body is read on, so that its sender reads the refusal rather than a broken pipe."""


class Gate:
    """An ASGI application around another: lets through what may be answered, and refuses the rest in our words."""

    def __init__(self, app: App, limits: Limits, token: str | None, hosts: frozenset[str] | None) -> None:
        """token: what callers must bear. hosts: what they may call this server; None: anything."""
        self.app, self.limits, self.hosts = app, limits, hosts
        self._digest = hashlib.sha256(token.encode()).digest() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def told(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, await self._pass(scope, receive), told)
        except ApiError as error:
            await _linger(receive)
            await refuse(error, send)
        except Exception:
            id = secrets.token_hex(4)
            LOG.exception("%s: %s %s failed", id, scope["method"], shown(scope["path"]))
            if not begun:
                await refuse(internal(id), send)

    async def _pass(self, scope: Scope, receive: Receive) -> Receive:
        """Return a receive that has the body ready. Raises ApiError for whom, and what, is not let through."""
        headers = dict(scope["headers"])
        self._check_host(headers.get(b"host", b""))
        if scope["path"] != "/health":
            self._check_token(headers.get(b"authorization", b""))
        if scope["method"] != "POST":
            return receive
        _check_type(headers)
        body = await self._body(headers, receive)
        ready = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return ready.pop() if ready else await receive()

        return again

    def _check_host(self, host: bytes) -> None:
        # A page elsewhere may have its own name resolve to this machine (DNS rebinding); it cannot change the header.
        if self.hosts is not None and called(host) not in self.hosts:
            found = shown(host.decode("latin-1").lower().strip())
            raise ApiError(
                403,
                f"Host: {found} is not this server; call it by {', '.join(sorted(self.hosts))}, or start it with "
                "a token",
                code="invalid_host",
            )

    def _check_token(self, header: bytes) -> None:
        if self._digest is None:
            return
        kind, _, token = header.partition(b" ")
        # Of digests, so that not even the token's length is told by the time it takes.
        same = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._digest)
        if not same or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "no valid token; send Authorization: Bearer with the one that the server was started with",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most, parts, size = self.limits.body_bytes, list[bytes](), 0
        told = headers.get(b"content-length", b"0")
        if len(told) > 18 or int(told) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body ended before its end")
                    size += len(message.get("body", b""))
                    if size > most:
                        raise _too_large(most)
                    parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.limits.body_seconds:g} s", code="timeout"
            ) from None


def _check_type(headers: dict[bytes, bytes]) -> None:
    # Also keeps forms of other sites out: JSON is not a type that a page may send elsewhere without asking.
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"Content-Type: found {shown(kind)}; expected application/json", code="invalid_content_type"
        )


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes, the most that this server takes", code="too_large")


async def _linger(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        return


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error as the whole response, and close the connection: what was sent on it is not all read."""
    body = error.encoded()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    encoded = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": False})
