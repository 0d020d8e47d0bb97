"""The heartbeat: a client's machine says every two seconds, in its own name, that it is there and what it is doing.

Flower notices a dead node after a minute; this notices within ten seconds. Both ends are here: the client signs, the
server checks.

    POST /alive    {"name": "ward-7", "session": "5f3a...", "at": 1763755923.4, "state": {"doing": "training", ...}}
    sheepfold-signature: base64 of ECDSA P-384/SHA-256 over the body, by the node's key

A beat whose session is "" is a knock: the server answers it, and keeps nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sheepfold.errors import WireError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PATH = "/alive"
HEADER = "sheepfold-signature"
EVERY_S = 2.0
"""Seconds between two beats"""
GONE_S = 10.0
"""Seconds of silence after which a client counts as gone"""
WINDOW_S = 300.0
"""Seconds by which a beat's time may differ from the server's clock"""
LARGEST = 16 * 1024
"""Bytes of a beat"""
LONGEST_SESSION = 64
MOST_FACTS = 16
"""Keys of a state"""


@dataclass(frozen=True, slots=True)
class Beat:
    """What one heartbeat says."""

    name: str
    """The client, as enrolled"""
    session: str
    """Another after each restart of the client's processes; "": a knock"""
    at: float
    """Of the client's clock, in seconds since 1970; each beat's is later than the one before"""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What the client is doing, for people: a few plain values"""


def sign(beat: Beat, key: ec.EllipticCurvePrivateKey) -> tuple[bytes, str]:
    """Return a beat's body, and its signature for the header."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    body = json.dumps(asdict(beat)).encode()
    return body, base64.b64encode(key.sign(body, ec.ECDSA(hashes.SHA256()))).decode()


def check(
    body: bytes, signature: str, keys: Mapping[str, ec.EllipticCurvePublicKey], now: float, last: Mapping[str, float]
) -> Beat:
    """Return the beat that a body holds.

    keys: {name: key} of the enrolled; now: the server's clock; last: {name: time of the newest beat that was taken}.
    Raises WireError for one that is damaged, of nobody enrolled, signed by another, too far from now, or replayed.
    """
    beat = _read(body)
    key = keys.get(beat.name)
    if key is None:
        raise WireError(f"{beat.name!r} is not enrolled here; `sheepfold enroll PUBKEY --name {beat.name}` enrols it")
    if not is_signed(body, signature, key):
        raise WireError(f"the signature is not by the key that {beat.name} enrolled with")
    if abs(now - beat.at) > WINDOW_S:
        raise WireError(
            f"{beat.name}'s clock differs from the server's by {abs(now - beat.at):.0f} s; set it, for instance by NTP"
        )
    if beat.session and beat.at <= last.get(beat.name, -math.inf):
        raise WireError(f"{beat.name} was heard with a later beat before; was this one sent again?")
    return beat


def is_signed(message: bytes, signature: str, key: ec.EllipticCurvePublicKey) -> bool:
    """Return whether a signature, in base64, is this key's for the message."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.verify(base64.b64decode(signature, validate=True), message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _read(body: bytes) -> Beat:
    try:
        found = json.loads(body)
        beat = Beat(**found)
    except (ValueError, TypeError, RecursionError):
        raise WireError("no heartbeat; expected name, session, at and state as JSON") from None
    texts = all(isinstance(v, str) and len(v) <= LONGEST_SESSION for v in (beat.name, beat.session))
    at = isinstance(beat.at, int | float) and not isinstance(beat.at, bool) and abs(beat.at) < 2**53
    if not texts or not at or not _is_state(beat.state):
        raise WireError("no heartbeat; expected short names, a time in seconds and a state of keys and values")
    return beat


def _is_state(found: Any) -> bool:
    """Return whether a state is a few plain values: what reads it again should not have to dig."""
    plain = (str, int, float, type(None))
    return isinstance(found, dict) and len(found) <= MOST_FACTS and all(isinstance(v, plain) for v in found.values())
