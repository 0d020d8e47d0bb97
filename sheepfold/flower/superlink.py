"""Flower's SuperLink on this machine's loopback: where it is, how it is started, and who it knows.

The SuperLink has no idea of users: whoever reaches it may run code. So it listens on loopback alone, a proxy of ours
lets nothing but nodes' own calls through, and tasks are handed only to who knows a secret.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sheepfold.errors import ConfigError, TrainingError
from sheepfold.flower import registry
from sheepfold.flower.fold import Fold, read_json
from sheepfold.flower.keys import public_pem, write_private

if TYPE_CHECKING:
    from flwr.supercore.control.control_http_client import ControlHttpClient

HOST = "127.0.0.1"
SECRET_BYTES = 32


class Unreachable(TrainingError):
    """The SuperLink does not answer: it is not there, or not yet."""


@dataclass(frozen=True, slots=True)
class Superlink:
    """Where a fold's SuperLink listens."""

    fold: Fold
    port: int

    @property
    def address(self) -> str:
        """Return host:port on loopback."""
        return f"{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Return the SuperLink's command."""
        fold = self.fold
        return [
            *("flower-superlink", "--host", HOST, "--port", str(self.port)),
            *("--ssl-ca-certfile", str(fold.ca), "--ssl-certfile", str(fold.certificate)),
            *("--ssl-keyfile", str(fold.key), "--database", str(fold.database), "--enable-supernode-auth"),
            *("--isolation", "process", "--superexec-auth-secret-file", str(fold.secret)),
            "--disable-runtime-dependency-installation",
        ]

    def executor_command(self) -> list[str]:
        """Return the command of what starts coordinators."""
        return [
            *("flower-superexec", "--runtime-api-address", self.address, "--root-certificates", str(self.fold.ca)),
            *("--superexec-auth-secret-file", str(self.fold.secret)),
        ]

    @contextlib.contextmanager
    def control(self) -> Iterator[ControlHttpClient]:
        """Yield a client of what tells the SuperLink what to do.

        Raises Unreachable where it does not answer, TrainingError where it refuses.
        """
        import httpx
        from flwr.supercore.control.control_http_client import ControlHttpClient

        client = ControlHttpClient.from_server_address(self.address, False, self.fold.ca.read_bytes(), interceptors=[])
        try:
            yield client
        except httpx.HTTPStatusError as error:
            raise TrainingError(f"Flower's SuperLink refuses: {said(error)}; see {self.fold.logs}") from None
        except httpx.HTTPError as error:
            raise Unreachable(f"Flower's SuperLink at {self.address} does not answer ({error})") from None
        finally:
            client.close()


def running(fold: Fold) -> Superlink:
    """Return the SuperLink of the fold's server. Raises ConfigError where no server has run."""
    said = read_json(fold.server)
    if said is None:
        raise ConfigError(f"{fold.path}: no server has run here; start `sheepfold server --fold {fold.path}`")
    return Superlink(fold, int(said["superlink"]))


def make_secret(fold: Fold) -> None:
    """Make the executor's secret, where there is none."""
    if not fold.secret.exists():
        write_private(fold.secret, secrets.token_bytes(SECRET_BYTES))


def reconcile(link: Superlink) -> list[str]:
    """Make Flower know exactly who is enrolled, and write down its numbers; returns a line for each that it refused.

    Raises Unreachable.
    """
    from flwr.proto.control_pb2 import ListNodesRequest, UnregisterNodeRequest

    wanted = {public_pem(node.public_key()): node.name for node in registry.nodes(link.fold).values()}
    refused = []
    with link.control() as control:
        listed = control.ListNodes(ListNodesRequest()).nodes_info
        there = {bytes(node.public_key): int(node.node_id) for node in listed if node.status != "unregistered"}
        for key in there.keys() - wanted.keys():
            control.UnregisterNode(UnregisterNodeRequest(node_id=there[key]))
        for key, name in wanted.items():
            if key not in there:
                try:
                    there[key] = _register(control, key, name)
                except TrainingError as error:
                    refused.append(str(error))
    registry.number(link.fold, {name: there[key] for key, name in wanted.items() if key in there})
    return refused


def _register(control: ControlHttpClient, key: bytes, name: str) -> int:
    import httpx
    from flwr.proto.control_pb2 import RegisterNodeRequest

    try:
        return int(control.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id)
    except httpx.HTTPStatusError as error:
        raise TrainingError(
            f"{name}: Flower refuses its key ({said(error)}); `sheepfold enroll --name {name} --remove`, then enrol a "
            "new key"
        ) from None


def said(error: Any) -> str:
    """Return what Flower says in an answer that is an error, as one line."""
    from flwr.supercore.error import FlowerError

    told = FlowerError.from_json(error.response.text)
    parts = [f"HTTP {error.response.status_code}"] if told is None else [told.message, told.public_details or ""]
    return " ".join(" ".join(parts).split())
