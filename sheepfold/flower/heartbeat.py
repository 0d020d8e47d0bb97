"""A client's end of the heartbeat (see alive.py): a thread that says every two seconds what its machine is doing."""

import ssl
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sheepfold.errors import ConfigError, SheepfoldError
from sheepfold.flower import alive, keys
from sheepfold.node.settings import NodeSettings
from sheepfold.wire.heads import plain

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 5.0
NO_SERVER_OF_OURS = (404, 405, 501)


class Unreachable(SheepfoldError):
    """The server does not answer: it is not there, or not yet."""


class Heartbeat:
    """One client's."""

    def __init__(self, settings: NodeSettings) -> None:
        """Be ready to say something. Raises ConfigError for a key or a CA that is none."""
        import httpx

        self.session = ""
        """In which messages reach this machine; "": in none, and nothing is said"""
        self.state: Mapping[str, Any] = {}
        """What the server's people should read"""
        self.refused: ConfigError | None = None
        """Why the server takes no beats any more"""
        self._settings = settings
        self._key = keys.private_key(settings.key)
        self._client = httpx.Client(verify=trust(settings), timeout=TIMEOUT_S)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def knock(self) -> None:
        """Ask whether this machine is welcome. Raises ConfigError where it is not, Unreachable where nobody says."""
        self._say("", {})

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Say nothing more."""
        self._ended.set()
        self._thread.join(TIMEOUT_S)
        self._client.close()

    def _run(self) -> None:
        while not self._ended.wait(alive.EVERY_S):
            if not (session := self.session):
                continue
            try:
                self._say(session, self.state)
                self.refused = None
            except Unreachable:
                continue  # it is heard again when the server is back
            except ConfigError as error:
                self.refused = error

    def _say(self, session: str, state: Mapping[str, Any]) -> None:
        import httpx

        body, signature = alive.sign(alive.Beat(self._settings.name, session, time.time(), state), self._key)
        url = f"https://{self._settings.server}{alive.PATH}"
        try:
            answer = self._client.post(url, content=body, headers={alive.HEADER: signature})
        except httpx.TransportError as error:
            raise self._explained(error) from None
        if answer.status_code == 200:
            return
        if answer.status_code == 403:
            raise ConfigError(f"{self._settings.server} refuses {self._settings.name}: {_reason(answer)}")
        if answer.status_code in NO_SERVER_OF_OURS:
            raise ConfigError(
                f"server: {self._settings.server} is no server of sheepfold's (HTTP {answer.status_code})"
            )
        raise Unreachable(f"{self._settings.server} answers with HTTP {answer.status_code}")

    def _explained(self, error: "httpx.TransportError") -> SheepfoldError:
        """Return in one line why nothing came through: what stays so is a ConfigError."""
        said, server = str(error), self._settings.server
        if "CERTIFICATE_VERIFY_FAILED" in said:
            why = said.partition("certificate verify failed:")[2].partition("(_ssl")[0].strip() or said
            return ConfigError(f"ca {self._settings.ca}: the certificate of {server} is not to be trusted ({why})")
        if "WRONG_VERSION_NUMBER" in said or "record layer" in said:
            return ConfigError(f"server: {server} does not speak TLS; is it another port's?")
        return Unreachable(f"{server} does not answer ({said})")


def trust(settings: NodeSettings) -> ssl.SSLContext:
    """Return what trusts the server's authority, and nobody else. Raises ConfigError for a file that is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(settings.ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"ca: {settings.ca} is no certificate ({error}); take the server's ca.crt") from None
    return context


def _reason(answer: "httpx.Response") -> str:
    try:
        return plain(str(answer.json()["error"]), 300)
    except (ValueError, KeyError, TypeError):
        return "it gives no reason"
