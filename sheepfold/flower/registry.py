"""Who is enrolled: names of ours, each with one public key, and the number that Flower gave it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sheepfold.errors import CheckpointError, ConfigError, suggest
from sheepfold.flower import keys
from sheepfold.flower.fold import Fold, read_json, write_json
from sheepfold.locks import locked

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""A client's name is also a file's, so it is spelled without the signs that mean something there."""


@dataclass(frozen=True, slots=True)
class Node:
    """One enrolled client."""

    name: str
    key: str
    """Public, as OpenSSH's one line"""
    node_id: int | None
    """Of Flower; None until a server has registered it"""

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Return its key. Raises ConfigError where the file was edited."""
        return keys.public_key(self.key, f"nodes.json, {self.name}")


def check_name(name: str) -> str:
    """Return a client's name. Raises ConfigError for one that is none."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: expected 1 to 63 letters, digits, dots, dashes and underscores, the first of them a "
            "letter or a digit, such as ward-7"
        )
    return name


def nodes(fold: Fold) -> dict[str, Node]:
    """Return {name: node} in the order of enrolment. Raises CheckpointError for a damaged nodes.json."""
    found = read_json(fold.nodes) or {}
    try:
        return {name: Node(name, str(said["key"]), said["node_id"]) for name, said in found.items()}
    except (KeyError, TypeError):
        raise CheckpointError(f"{fold.nodes}: an entry without key and node_id; was it edited? Repair it") from None


def enroll(fold: Fold, name: str, public: Path) -> Node:
    """Enrol a client by its public key's file. Raises ConfigError for a bad name or key, or one that is taken."""
    fold.require()
    node = Node(check_name(name), keys.public_line(public), None)
    with locked(fold.path / ".nodes.lock"):
        known = nodes(fold)
        # Names become files, and some file systems take Ward-7 for ward-7.
        for other in known.values():
            if other.name.lower() == name.lower():
                same = "the same key" if other.key == node.key else "another key"
                raise ConfigError(f"--name {name}: {other.name} is enrolled already, with {same}; see --remove")
            if other.key == node.key:
                raise ConfigError(f"{public}: the key of {other.name}, enrolled already; every client needs its own")
        if node.key in _removed(fold):
            raise ConfigError(f"{public}: was removed before, and a removed key is never taken again; {keys.HOW}")
        _write(fold, {**known, name: node})
    return node


def remove(fold: Fold, name: str) -> Node:
    """Strike a client off. Raises ConfigError where it is not enrolled."""
    fold.require()
    with locked(fold.path / ".nodes.lock"):
        known = nodes(fold)
        if name not in known:
            there = suggest(name, known) if known else "nobody is"
            raise ConfigError(f"--name {name}: is not enrolled; {there}")
        gone = known.pop(name)
        if gone.node_id is not None:  # Flower has it, and keeps keys that it let go as taken
            write_json(fold.removed, {"keys": [*_removed(fold), gone.key]})
        _write(fold, known)
    (fold.seen / f"{name}.json").unlink(missing_ok=True)
    return gone


def number(fold: Fold, ids: Mapping[str, int]) -> None:
    """Write down the numbers that Flower gave, {name: node_id}; names struck off meanwhile are left out."""
    with locked(fold.path / ".nodes.lock"):
        known = nodes(fold)
        new = {n: Node(n, node.key, ids.get(n, node.node_id)) for n, node in known.items()}
        if new != known:
            _write(fold, new)


def _removed(fold: Fold) -> list[str]:
    return list((read_json(fold.removed) or {}).get("keys", []))


def _write(fold: Fold, known: Mapping[str, Node]) -> None:
    write_json(fold.nodes, {n: {"key": node.key, "node_id": node.node_id} for n, node in known.items()})
