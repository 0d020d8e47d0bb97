"""Who may pass the proxy: a call of the fleet's interface that bears the signed time of an enrolled key.

Flower's SuperLink checks the same, but only once it holds the whole request; here it costs a stranger's caller nothing
but a line of refusal. A key that was removed is refused at once.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sheepfold.errors import SheepfoldError
from sheepfold.flower import alive, keys, registry
from sheepfold.flower.fold import Fold, stamp

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

FLEET = re.compile(rb"/v1/fleet/[a-z]+(?:-[a-z]+)*")
"""The whole path as it was sent: nothing encoded, no dots, no doubled slashes, no query"""
KEY, TIME, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
FORWARDED = {b"content-type", b"content-length", b"accept", b"accept-encoding", b"user-agent"}
"""Headers that go on beside Flower's own"""
TOLERANCE_S = 305.0
"""Flower's own, and its allowance for clocks that differ"""


class Refusal(Exception):
    """A request that does not pass: a status and a line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(slots=True)
class Enrolled:
    """Public keys by name and by PEM, read again when nodes.json changes."""

    fold: Fold
    keys: dict[str, ec.EllipticCurvePublicKey]
    names: dict[bytes, str]
    _stamp: tuple[int, int] | None = None

    @classmethod
    def of(cls, fold: Fold) -> Enrolled:
        """Return those of a fold."""
        return cls(fold, {}, {})

    def refresh(self) -> None:
        """Read nodes.json where it changed; one that cannot be read lets nobody pass."""
        if (now := stamp(self.fold.nodes)) == self._stamp:
            return
        try:
            self.keys = {n: node.public_key() for n, node in registry.nodes(self.fold).items()}
        except SheepfoldError:
            self.keys, self._stamp = {}, None
            self.names = {}
            raise
        self.names = {keys.public_pem(key): name for name, key in self.keys.items()}
        self._stamp = now


def one(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the only header of this name. Raises Refusal where there is none, or several."""
    found = [value for key, value in headers if key == name]
    if len(found) != 1:
        raise Refusal(401, f"expected one header {name.decode()}, found {len(found)}")
    return found[0]


def caller(headers: list[tuple[bytes, bytes]], enrolled: Enrolled) -> str:
    """Return the name of the client that signed a call. Raises Refusal (401) for anybody else."""
    try:
        name = enrolled.names.get(base64.b64decode(one(headers, KEY), validate=True))
        said = one(headers, TIME).decode("ascii")
        age = (datetime.now(UTC) - datetime.fromisoformat(said)).total_seconds()
    except (binascii.Error, ValueError, TypeError):
        raise Refusal(401, "no signed time of a key") from None
    if name is None:
        raise Refusal(401, "this key is not enrolled here")
    if abs(age) > TOLERANCE_S:
        raise Refusal(401, f"{name}'s clock differs from the server's by {abs(age):.0f} s")
    signature = one(headers, SIGNATURE).decode("latin-1")
    if not alive.is_signed(said.encode(), signature, enrolled.keys[name]):
        raise Refusal(401, f"the signature is not by the key that {name} enrolled with")
    return name


def forwarded(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers that go on: Flower's own and the plain ones, none of the connection's."""
    return [(k, v) for k, v in headers if k in FORWARDED or k.startswith(b"flwr-") or k == b"traceparent"]
