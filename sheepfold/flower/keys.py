"""Keys of nodes: EC P-384, private in OpenSSH's format, public as OpenSSH's one line; what Flower and ssh-keygen read.

ssh-keygen -t ecdsa -b 384 -N "" -f ward-7.key        makes the same as `sheepfold certs --node ward-7`
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sheepfold.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

HOW = "make one with `sheepfold certs FOLDER --node NAME`"
LARGEST = 16 * 1024
"""Bytes of a key file; what is larger is none."""


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a node's private key. Raises ConfigError for what is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(_content(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: no private key in OpenSSH's format without a password ({error}); {HOW}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: {_kind(key)}, expected EC P-384 (ecdsa-sha2-nistp384); {HOW}")
    return key


def public_line(path: Path) -> str:
    """Return the public key of a file as its one line, without the comment. Raises ConfigError for what is none."""
    content = _content(path)
    if b"PRIVATE KEY" in content:
        raise ConfigError(f"{path}: a private key, which never leaves its machine; give the public one (.pub)")
    try:
        line = content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: no public key in OpenSSH's format; {HOW}") from None
    public_key(line, str(path))
    return " ".join(line.split()[:2])


def public_key(line: str, where: str) -> ec.EllipticCurvePublicKey:
    """Return the key of an OpenSSH line. Raises ConfigError for what is no EC P-384 key; `where` names the place."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{where}: no public key in OpenSSH's format ({error}); {HOW}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{where}: {_kind(key)}, expected EC P-384 (ecdsa-sha2-nistp384); {HOW}")
    return key


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as PEM, the form by which Flower knows nodes."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def make(private: Path, public: Path, comment: str) -> None:
    """Make a node's two key files; the private one can be read by its owner alone. Raises OSError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    write_private(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(line + f" {comment}\n".encode())


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, from its first byte on; whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a node's key file") from None


def _kind(key: object) -> str:
    curve = getattr(getattr(key, "curve", None), "name", None)
    return f"a key on the curve {curve}" if curve else f"a key of another kind ({type(key).__name__.strip('_')})"
