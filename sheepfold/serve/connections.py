"""Connections that cost nothing while they say nothing: bounded in number, and each step bounded in time.

uvicorn waits for ever for headers to arrive and for what it sent to be taken. Here the first has `body_seconds`, the
second too, and connections beyond the limit are told so and closed.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sheepfold.serve.faults import ApiError
from sheepfold.serve.limits import Limits

HEADER_BYTES = 32 * 1024
"""All of a request's headers together."""


def protocol(limits: Limits) -> type[Any]:
    """Return uvicorn's HTTP/1.1 protocol with these limits."""
    return type("Connection", (Connection,), {"limits": limits})


class Connection(H11Protocol):  # type: ignore[misc]
    """One client's connection."""

    limits: Limits
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    _refused = False

    def connection_made(self, transport: Any) -> None:
        if len(self.connections) < self.limits.connections:
            super().connection_made(transport)
            self._expect_headers()
            return
        self.transport, self._refused = transport, True
        self._reading = self.loop.call_later(1, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._refused:  # told only now: a connection closed on unread data is reset, and the answer lost with it
            most = self.limits.connections
            self._end(ApiError(503, f"{most} connections are open, the most that this server has", code="too_busy"))
            return
        super().data_received(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._expect_headers()
        else:
            self._off("_reading")

    def connection_lost(self, exc: Exception | None) -> None:
        self._off("_reading")
        self._off("_writing")
        if not self._refused:
            super().connection_lost(exc)

    def pause_writing(self) -> None:
        if not self._refused:
            super().pause_writing()
        self._writing = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._off("_writing")
        if not self._refused:
            super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self._writing is None:  # what was sent last may never be taken either
            self._writing = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or too much of it, in OpenAI's shape."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._end(
                ApiError(400, f"not a request that this server reads ({msg.lower().rstrip('.')})", code="not_http")
            )
        self.transport.close()

    def _expect_headers(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self.limits.body_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._end(ApiError(408, f"no whole request within {self.limits.body_seconds:g} s", code="timeout"))

    def _end(self, error: ApiError) -> None:
        """Answer outside of any request, and close."""
        body = error.encoded()
        head = f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _off(self, timer: str) -> None:
        """Stop one of the two timers, if it is running."""
        running: asyncio.TimerHandle | None = getattr(self, timer)
        if running is not None:
            running.cancel()
        setattr(self, timer, None)
