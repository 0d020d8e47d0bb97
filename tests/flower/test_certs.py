"""Certificates and keys: what is made, what is refused, what a renewal asks of nodes."""

import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from sheepfold.cli import app
from sheepfold.errors import ConfigError
from sheepfold.flower import certs, keys, registry
from sheepfold.flower.fold import Fold


def run(*words: str) -> None:
    """Run a command in this process; its errors are raised."""
    app(list(words), standalone_mode=False)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    made = Fold(tmp_path / "fold")
    certs.make(made, ["fold.example.org", "10.0.0.5", "::1"], 90)
    return made


def test_the_server_certificate_is_the_cas_and_for_the_names_that_nodes_call(fold: Fold) -> None:
    ca, server = load(fold.ca), load(fold.certificate)
    server.verify_directly_issued_by(ca)
    assert certs.read(fold)[1].hosts == ("fold.example.org", "10.0.0.5", "::1", "localhost", "127.0.0.1")
    assert 89 < certs.read(fold)[1].days < 90
    assert server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_private_files_are_their_owners_alone(fold: Fold, tmp_path: Path) -> None:
    run("certs", str(tmp_path), "--node", "ward-7")
    for path in (fold.key, fold.ca_key, tmp_path / "ward-7.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(fold.path.stat().st_mode) == 0o700


def test_openssl_and_ssh_keygen_read_what_is_made(fold: Fold, tmp_path: Path) -> None:
    run("certs", str(tmp_path), "--node", "ward-7")
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", fold.ca, fold.certificate]
    assert subprocess.run(verify, capture_output=True, check=True).stdout.endswith(b"OK\n")
    assert keys.public_line(tmp_path / "ward-7.pub") in (tmp_path / "ward-7.pub").read_text()
    assert keys.private_key(tmp_path / "ward-7.key").public_key() == keys.public_key(
        keys.public_line(tmp_path / "ward-7.pub"), ""
    )


def test_nothing_is_overwritten(fold: Fold, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in fold.path.iterdir()}
    with pytest.raises(ConfigError, match="is there already"):
        run("certs", str(fold.path))
    run("certs", str(tmp_path), "--node", "ward-7")
    key = (tmp_path / "ward-7.key").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        run("certs", str(tmp_path), "--node", "ward-7")
    assert {path: path.read_bytes() for path in fold.path.iterdir()} == before
    assert (tmp_path / "ward-7.key").read_bytes() == key
    run("certs", str(tmp_path), "--node", "ward-7", "--renew")
    assert (tmp_path / "ward-7.key").read_bytes() != key


def test_a_nodes_keys_come_without_a_ca(tmp_path: Path) -> None:
    run("certs", str(tmp_path / "mine"), "--node", "ward-7")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"ward-7.key", "ward-7.pub"}


def test_renewing_the_server_certificate_touches_no_node(fold: Fold, capsys: pytest.CaptureFixture[str]) -> None:
    ca, old = fold.ca.read_bytes(), load(fold.certificate)
    run("certs", str(fold.path), "--renew", "--days", "200")
    assert "no node" in capsys.readouterr().out
    new = load(fold.certificate)
    assert fold.ca.read_bytes() == ca
    assert new.public_key() != old.public_key()
    new.verify_directly_issued_by(load(fold.ca))
    assert certs.read(fold)[1].hosts[0] == "fold.example.org"
    assert certs.read(fold)[1].days > 199


def test_nodes_with_the_old_ca_go_on_after_it_was_renewed(fold: Fold, capsys: pytest.CaptureFixture[str]) -> None:
    old = load(fold.ca)
    run("certs", str(fold.path), "--renew-ca")
    assert f"send {fold.ca} to every node before" in capsys.readouterr().out
    assert load(fold.ca) != old
    load(fold.certificate).verify_directly_issued_by(old)
    load(fold.certificate).verify_directly_issued_by(load(fold.ca))
    assert load(fold.path / "ca.old.crt") == old


def test_a_certificate_near_its_end_is_warned_about(fold: Fold, capsys: pytest.CaptureFixture[str]) -> None:
    assert certs.read(fold)[1].warning() is None
    run("certs", str(fold.path), "--renew", "--days", "29")
    assert "--renew" in capsys.readouterr().err
    assert "in 29 days" in str(certs.read(fold)[1].warning())
    run("status", "--fold", str(fold.path))
    assert "warning" in capsys.readouterr().out
    gone = certs.Certificate(fold.certificate, "server", (), datetime.now(UTC) - timedelta(days=2), "")
    assert "ended on" in str(gone.warning())


def test_show_shows_both_and_changes_nothing(fold: Fold, capsys: pytest.CaptureFixture[str]) -> None:
    before = fold.certificate.read_bytes()
    run("certs", str(fold.path), "--show")
    out = capsys.readouterr().out
    assert str(fold.ca) in out
    assert "fold.example.org" in out
    assert fold.certificate.read_bytes() == before


@pytest.mark.parametrize("host", ["", "fold.example.org:8443", "https://fold", "a b", "-" * 300, "ex$mple.org"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        certs.make(Fold(tmp_path / "fold"), [host], 90)
    assert not (tmp_path / "fold").exists()


def test_words_that_do_nothing_together_are_refused(fold: Fold, tmp_path: Path) -> None:
    for words in (
        ["--show", "--renew"],
        ["--renew", "--renew-ca"],
        ["--node", "x", "--renew-ca"],
        ["--node", "x", "--days", "3"],
        ["--show", "--days", "3"],
    ):
        with pytest.raises(ConfigError):
            run("certs", str(fold.path), *words)
    assert not (fold.path / "x.key").exists()


def test_places_without_certificates_are_refused_in_one_line(tmp_path: Path) -> None:
    for words in (["certs", "--show"], ["certs", "--renew"], ["certs", "--renew-ca"]):
        with pytest.raises(ConfigError, match="no server's folder"):
            run(words[0], str(tmp_path), *words[1:])
    key = tmp_path / "k.pub"
    key.write_text("x")
    for words in (["status"], ["stop"], ["server"], ["enroll", str(key), "--name", "x"]):
        with pytest.raises(ConfigError, match="no server's folder"):
            run(*words, "--fold", str(tmp_path))


def test_a_damaged_certificate_is_named(fold: Fold) -> None:
    fold.certificate.write_text("nothing")
    with pytest.raises(ConfigError, match=r"server\.crt: no certificate"):
        certs.read(fold)
    assert registry.nodes(fold) == {}
