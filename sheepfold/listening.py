"""Where a page or an endpoint listens, who may reach it, and by which names: for chat and serve.

An address is bound before a model is loaded, so that a taken port is known at once.
"""

import errno
import ipaddress
import os
import socket
from pathlib import Path

from sheepfold.errors import ConfigError

TOKEN = "SHEEPFOLD_TOKEN"
"""The environment variable that holds the token, where no file does."""
SHORTEST_TOKEN = 16
"""Characters: what can be guessed is no token."""


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


def called(host: bytes) -> str:
    """Return the name in a request's Host header, without its port; of IPv6 with its brackets."""
    name = host.decode("latin-1").lower().strip()
    return name[: name.rfind("]") + 1] if name.startswith("[") else name.partition(":")[0]
