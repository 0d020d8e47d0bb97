"""From a command's words to a server that runs until it is told to stop.

address (bound first: a taken port is known before a model is loaded) ─ model ─ routes ─ uvicorn ─ signal ─ end
"""

import asyncio
import gc
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from sheepfold.answering.model import Answering
from sheepfold.serve import app as routes
from sheepfold.serve.connections import HEADER_BYTES, protocol
from sheepfold.serve.limits import Limits

GRACE = 5
"""Seconds for replies under way to end after a signal."""


def address(taken: socket.socket) -> str:
    """Return the URL of a bound socket."""
    name, port = taken.getsockname()[:2]
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"


def greeting(answering: Answering, url: str, token: str | None) -> str:
    """Return what the terminal says: the address on one line, a request to try on the next."""
    names = ", ".join(answering.names[:8]) + (", ..." if len(answering.names) > 8 else "")
    body = json.dumps({"model": answering.default, "messages": [{"role": "user", "content": "Hello"}]})
    bearer = " -H 'Authorization: Bearer TOKEN'" if token else ""
    return (
        f"serving {answering.source.name} at {url} (models: {names}); stop with Ctrl-C\n"
        f"try: curl {url}/chat/completions -H 'Content-Type: application/json'{bearer} -d '{body}'"
    )


def serve(
    answering: Answering,
    taken: socket.socket,
    limits: Limits,
    *,
    token: str | None,
    hosts: frozenset[str] | None,
    say: Callable[[str], None],
    access_log: bool = False,
) -> None:
    """Answer requests on a bound socket until SIGINT or SIGTERM; `say` is told the greeting once it listens."""
    _log(access_log)
    gc.collect()
    gc.freeze()  # what is loaded stays: walking over it again and again makes a large body take seconds to parse
    app = routes.build(answering, limits, token, hosts)
    config = uvicorn.Config(
        app,
        http=protocol(limits),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE,
    )
    greeted = greeting(answering, address(taken), token)
    asyncio.run(_Server(config, app.state.service, lambda: say(greeted)).serve(sockets=[taken]))


class _Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's server; a signal ends what is being answered, and is then done with."""

    def __init__(self, config: Any, service: routes.Service, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._listening = service, listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.close()
        await super().shutdown(sockets)
        await asyncio.to_thread(self._service.queue.join, GRACE)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal; uvicorn's own raises it once more afterwards, which would end us with a traceback."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _log(access_log: bool) -> None:
    """Let our own lines and uvicorn's errors go to standard error; what clients send malformed is neither."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if access_log else logging.CRITICAL)
