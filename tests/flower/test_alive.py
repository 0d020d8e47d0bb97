"""What a heartbeat may say, and what becomes of one that was written down badly."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from sheepfold.errors import CheckpointError, WireError
from sheepfold.flower import alive
from sheepfold.flower.fold import Fold, glance, read_json
from sheepfold.flower.overview import look
from tests.flower.test_jobs import fold as fold  # a fixture

NOW = 1763755923.5
KEY = ec.generate_private_key(ec.SECP384R1())
DEEP = "[" * 900 + "]" * 900


def checked(state: str) -> alive.Beat:
    """Return the beat of a client that signs this state, JSON as it travels."""
    body = f'{{"name": "ann", "session": "s", "at": {NOW}, "state": {state}}}'.encode()
    signature = base64.b64encode(KEY.sign(body, ec.ECDSA(hashes.SHA256()))).decode()
    return alive.check(body, signature, {"ann": KEY.public_key()}, NOW, {})


def test_a_state_is_a_few_plain_values() -> None:
    said: dict[str, Any] = {"phase": "training", "round": 3, "step": 7, "share": 0.5, "why": None}
    assert checked(json.dumps(said)).state == said


@pytest.mark.parametrize(
    "state", [f'{{"doing": {DEEP}}}', '{"doing": {"a": 1}}', "[]", json.dumps({str(n): n for n in range(17)})]
)
def test_a_state_that_its_readers_would_have_to_dig_in_is_refused(state: str) -> None:
    with pytest.raises(WireError, match="no heartbeat; expected short names"):
        checked(state)


def test_a_file_too_deep_to_read_is_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "deep.json")


def test_what_a_power_cut_left_of_a_heartbeat_stops_nobody(fold: Fold) -> None:
    fold.nodes.write_text('{"ann": {"key": "a key", "node_id": 1}}')
    fold.seen.mkdir()
    for path in (fold.seen / "ann.json", fold.traffic):
        path.write_text("")
        assert glance(path) is None
    [ann] = look(fold).nodes
    assert (ann.seen_s_ago, ann.bytes_up) == (None, 0)
