"""From a command's words to a server that runs until it is told to stop.

address (bound first: a taken port is known before a model is loaded) ─ model ─ routes ─ uvicorn ─ signal ─ end
"""

import asyncio
import errno
import gc
import ipaddress
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from sheepfold.answering.model import Answering
from sheepfold.errors import ConfigError
from sheepfold.serve import app as routes
from sheepfold.serve.connections import HEADER_BYTES, protocol
from sheepfold.serve.limits import Limits

TOKEN = "SHEEPFOLD_TOKEN"
"""The environment variable that holds the token, where no file does."""
SHORTEST_TOKEN = 16
"""Characters: what can be guessed is no token."""
GRACE = 5
"""Seconds for replies under way to end after a signal."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, not yet listening. Raises ConfigError where that cannot be."""
    if not 0 <= port < 2**16:  # a resolver takes the rest of a division
        raise ConfigError(f"--port {port}: expected 0 to 65535")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {error}; give a name or an address of this machine") from None
    taken = socket.socket(family, kind)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except OSError as error:
        taken.close()
        way = "take another, or --port 0 for a free one" if error.errno == errno.EADDRINUSE else "take another address"
        raise ConfigError(f"--host {host} --port {port}: {(error.strerror or str(error)).lower()}; {way}") from None
    return taken


def is_loopback(taken: socket.socket) -> bool:
    """Return whether only this machine reaches a bound socket."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback


def read_token(file: Path | None) -> str | None:
    """Return the token of a file, else of the environment; None where there is none. Raises ConfigError."""
    where, token = f"--token-file {file}", os.environ.get(TOKEN)
    if file is None and token is None:
        return None
    if file is None:
        where = f"${TOKEN}"
    else:
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or 'is not text'}") from None
    token = (token or "").strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{where}: expected one line of {SHORTEST_TOKEN} or more ASCII characters without spaces, such as "
            "`openssl rand -hex 24` writes"
        )
    return token


def check_open(host: str, taken: socket.socket, token: str | None) -> None:
    """Raise ConfigError where others could reach the server, and nothing tells them apart."""
    if token is None and not is_loopback(taken):
        raise ConfigError(
            f"--host {host}: others reach this address, so a token is needed: --token-file FILE, or ${TOKEN}; or "
            "listen on 127.0.0.1"
        )


def hosts_of(host: str, token: str | None) -> frozenset[str] | None:
    """Return the names that the server may be called by; None: any, since a token tells who calls."""
    own = f"[{host}]" if ":" in host else host.lower()
    return frozenset({"localhost", "127.0.0.1", "[::1]", own}) if token is None else None


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
