"""Certificates: a CA of the server's own, the server's certificate by it, and how long they hold.

    CA (ca.crt goes to every node, ca.key stays) ── signs ──▶ server.crt (names and addresses that nodes call)

Nodes hold ca.crt alone, so a new server certificate by the same CA touches no node. A renewed CA keeps its key: nodes
with the old ca.crt go on until that one ends, and are sent the new one before.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sheepfold.errors import ConfigError
from sheepfold.flower.fold import Fold
from sheepfold.flower.keys import write_private
from sheepfold.folders import replace_file

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

SERVER_DAYS = 365
CA_DAYS = 3650
WARN_DAYS = 30
LOOPBACK = ("localhost", "127.0.0.1")
"""Always among the server's names: its own processes call it so"""
BACKDATED = timedelta(hours=1)
"""How long before now a certificate begins, since other machines' clocks may be behind"""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is to be known of a certificate."""

    path: Path
    subject: str
    hosts: tuple[str, ...]
    """Names and addresses that it is for; of a CA none"""
    until: datetime
    fingerprint: str
    """SHA-256, as pairs of hex digits"""

    @property
    def days(self) -> float:
        """Days until it ends; below 0 once it has."""
        return (self.until - datetime.now(UTC)) / timedelta(days=1)

    def warning(self) -> str | None:
        """Return a line where it has ended or soon will."""
        way = "--renew-ca" if self.subject == "CA" else "--renew"
        do = f"`sheepfold certs {self.path.parent} {way}`"
        if self.days < 0:
            return f"{self.path}: ended on {self.until:%Y-%m-%d}; nodes refuse it: {do}"
        if self.days < WARN_DAYS:
            return f"{self.path}: ends on {self.until:%Y-%m-%d}, in {self.days:.0f} days: {do}"
        return None


def read(fold: Fold) -> list[Certificate]:
    """Return the CA's and the server's certificates. Raises ConfigError where they cannot be read."""
    fold.require()
    return [_about(fold.ca, "CA"), _about(fold.certificate, "server")]


def make(fold: Fold, hosts: Sequence[str], days: int) -> None:
    """Make a CA, and the server's certificate. Raises ConfigError where one is there."""
    for path in (fold.ca, fold.ca_key, fold.certificate, fold.key):
        if path.exists():
            raise ConfigError(f"{path}: is there already; --show shows it, --renew makes a new server certificate")
    for host in hosts:
        check_host(host)
    fold.path.mkdir(parents=True, exist_ok=True)
    fold.path.chmod(0o700)  # what others of this machine could read would be Flower's database too
    _write_ca(fold, None)
    _write_server(fold, hosts, days)


def renew(fold: Fold, hosts: Sequence[str], days: int) -> None:
    """Make a new server certificate and key by the same CA; `hosts` empty: for the same names as before.

    Raises ConfigError where the CA ends before the certificate would, or there is none.
    """
    ca, server = read(fold)
    if ca.days < days:
        raise ConfigError(
            f"--days {days}: the CA ends on {ca.until:%Y-%m-%d}, before that; take fewer days, or --renew-ca"
        )
    _write_server(fold, hosts or server.hosts, days)


def renew_ca(fold: Fold, hosts: Sequence[str], days: int) -> datetime:
    """Make a new CA certificate with the same key, and a new server certificate; returns when the old CA ends."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    old, server = read(fold)
    key = load_pem_private_key(_bytes(fold.ca_key), None)
    replace_file(fold.ca.with_name("ca.old.crt"), fold.ca.read_bytes())
    _write_ca(fold, key)  # type: ignore[arg-type]
    _write_server(fold, hosts or server.hosts, days)
    return old.until


def check_host(host: str) -> str:
    """Return a name or an address that nodes may call. Raises ConfigError for what is neither."""
    labels = host.removeprefix("*.").split(".")
    plain = all(p and len(p) <= 63 and p.replace("-", "a").isalnum() and p.isascii() for p in labels)
    if not _is_address(host) and not (plain and len(host) <= 253):
        raise ConfigError(
            f"--host {host!r}: expected a name or an address without port, such as fold.example.org or 10.0.0.5"
        )
    return host


def _write_ca(fold: Fold, key: ec.EllipticCurvePrivateKey | None) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    if key is None:
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(fold.ca_key, _pem(key))
    name = _name("sheepfold CA")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates and CRLs
    built = (
        _begin(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _save(fold.ca, built, key)


def _write_server(fold: Fold, hosts: Sequence[str], days: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    ca_key = load_pem_private_key(_bytes(fold.ca_key), None)
    ca = x509.load_pem_x509_certificate(_bytes(fold.ca))
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [check_host(h) for h in dict.fromkeys([*hosts, *LOOPBACK])]
    named = [x509.IPAddress(ipaddress.ip_address(n)) if _is_address(n) else x509.DNSName(n) for n in names]
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # signs handshakes
    built = (
        _begin(_name("sheepfold server"), ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(named), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    write_private(fold.key, _pem(key))
    _save(fold.certificate, built, ca_key)


def _begin(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _save(path: Path, built: x509.CertificateBuilder, by: ec.EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    replace_file(path, built.sign(by, hashes.SHA256()).public_bytes(Encoding.PEM))
    os.chmod(path, 0o644)  # whoever wants to join reads it


def _about(path: Path, subject: str) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    try:
        found = x509.load_pem_x509_certificate(_bytes(path))
    except ValueError as error:
        raise ConfigError(f"{path}: no certificate ({error}); was it edited? --renew makes a new one") from None
    hosts: tuple[str, ...] = ()
    if subject != "CA":
        named = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(name.value) for name in named)
    return Certificate(path, subject, hosts, found.not_valid_after_utc, found.fingerprint(hashes.SHA256()).hex(":"))


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); `sheepfold certs` made it") from None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
