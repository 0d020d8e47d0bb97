"""Who is enrolled: names and keys that may be, and those that may not."""

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.flower import certs, keys, registry
from sheepfold.flower.fold import Fold
from tests.flower.test_certs import run


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    made = Fold(tmp_path / "fold")
    certs.make(made, ["localhost"], 90)
    return made


def public(folder: Path, name: str) -> Path:
    keys.make(folder / f"{name}.key", folder / f"{name}.pub", name)
    return folder / f"{name}.pub"


def test_enrolled_clients_keep_their_order_and_their_keys(fold: Fold, tmp_path: Path) -> None:
    for name in ("ward-7", "lab", "a.b_c"):
        run("enroll", str(public(tmp_path, name)), "--name", name, "--fold", str(fold.path))
    assert list(registry.nodes(fold)) == ["ward-7", "lab", "a.b_c"]
    node = registry.nodes(fold)["lab"]
    assert node.node_id is None
    assert node.public_key() == keys.private_key(tmp_path / "lab.key").public_key()


def test_a_key_of_ssh_keygen_is_taken(fold: Fold, tmp_path: Path) -> None:
    made = tmp_path / "made"
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", made], check=True)
    except FileNotFoundError:
        pytest.skip("no ssh-keygen here")
    registry.enroll(fold, "ward-7", made.with_suffix(".pub"))
    assert registry.nodes(fold)["ward-7"].public_key() == keys.private_key(made).public_key()


def test_a_name_or_a_key_that_is_taken_is_refused(fold: Fold, tmp_path: Path) -> None:
    first, second = public(tmp_path, "first"), public(tmp_path, "second")
    registry.enroll(fold, "ward-7", first)
    for name, key, why in (
        ("ward-7", first, "with the same key"),
        ("ward-7", second, "with another key"),
        ("Ward-7", second, "ward-7 is enrolled already"),
        ("lab", first, "the key of ward-7"),
    ):
        with pytest.raises(ConfigError, match=why):
            registry.enroll(fold, name, key)
    assert list(registry.nodes(fold)) == ["ward-7"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-x", "x" * 64, "ä", "a\n", "../x"])
def test_a_name_that_is_none_is_refused(fold: Fold, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        registry.enroll(fold, name, public(tmp_path, "x"))


def test_keys_of_other_kinds_are_refused_by_what_they_are(fold: Fold, tmp_path: Path) -> None:
    def line(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> bytes:
        return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

    keys.make(tmp_path / "x.key", tmp_path / "x.pub", "x")
    files = {
        "secp256r1": line(ec.generate_private_key(ec.SECP256R1()).public_key()),
        "Ed25519": line(ed25519.Ed25519PrivateKey.generate().public_key()),
        "a private key": (tmp_path / "x.key").read_bytes(),
        "no public key": b"ecdsa-sha2-nistp384 AAAA",
        "no public": b"\xff\xfe",
    }
    for why, content in files.items():
        (tmp_path / "k.pub").write_bytes(content)
        with pytest.raises(ConfigError, match=why):
            registry.enroll(fold, "ward-7", tmp_path / "k.pub")
    with pytest.raises(ConfigError, match="cannot be read"):
        registry.enroll(fold, "ward-7", tmp_path / "none.pub")
    with pytest.raises(ConfigError, match="no private key"):
        keys.private_key(tmp_path / "x.pub")


def test_a_removed_key_is_never_taken_again_once_flower_had_it(fold: Fold, tmp_path: Path) -> None:
    key = public(tmp_path, "x")
    registry.enroll(fold, "wrong-name", key)
    run("enroll", "--name", "wrong-name", "--remove", "--fold", str(fold.path))
    registry.enroll(fold, "ward-7", key)  # no server had seen it
    registry.number(fold, {"ward-7": 7, "gone": 8})
    assert registry.nodes(fold)["ward-7"].node_id == 7
    registry.remove(fold, "ward-7")
    assert registry.nodes(fold) == {}
    with pytest.raises(ConfigError, match="removed before"):
        registry.enroll(fold, "ward-7", key)
    with pytest.raises(ConfigError, match="is not enrolled"):
        registry.remove(fold, "ward-7")


def test_a_damaged_list_is_named(fold: Fold) -> None:
    for content in ("{", "[]", json.dumps({"ward-7": {}}), json.dumps({"ward-7": 3})):
        fold.nodes.write_text(content)
        with pytest.raises(CheckpointError, match=r"nodes\.json"):
            registry.nodes(fold)


def test_many_who_enrol_at_once_are_all_enrolled(fold: Fold, tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(4)]
    made = [public(tmp_path, name) for name in names]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(registry.enroll, [(fold, name, key) for name, key in zip(names, made, strict=True)])
    assert set(registry.nodes(fold)) == set(names)
