"""The ledger: every byte that left, whatever happened in between."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.errors import CheckpointError
from sheepfold.node.ledger import Ledger

WHERE = {"run": "0" * 16, "client": "ward-7"}


def test_every_message_has_a_line_and_the_total_runs_on(tmp_path):
    path = tmp_path / "ledger" / "leaving.jsonl"
    messages = [b"a" * 10, b"b" * 300, b""]
    for round, data in enumerate(messages, 1):
        Ledger(path).note("update", data, round=round, **WHERE)  # opened anew each time, as after a restart
    entries = list(Ledger(path).entries())
    assert [e.bytes for e in entries] == [10, 300, 0]
    assert [e.total for e in entries] == [10, 310, 310]
    assert [e.sha256 for e in entries] == [hashlib.sha256(m).hexdigest() for m in messages]
    assert [e.round for e in entries] == [1, 2, 3]
    assert Ledger(path).total == 310


@settings(max_examples=25)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), st.integers(1, 400))
def test_a_line_that_was_cut_short_is_dropped_and_the_rest_stands(tmp_path_factory, sizes, cut):
    path = tmp_path_factory.mktemp("ledger") / "leaving.jsonl"
    ledger = Ledger(path)
    for size in sizes:
        ledger.note("update", bytes(size), round=1, **WHERE)
    before = path.read_bytes()
    path.write_bytes(before[: max(0, len(before) - cut)])
    again = Ledger(path)
    kept = [e.bytes for e in again.entries()]
    assert kept == sizes[: len(kept)]
    assert again.total == sum(kept)
    assert again.note("absence", b"x", round=2, **WHERE).total == sum(kept) + 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_an_edited_ledger_is_not_added_to(tmp_path):
    path = tmp_path / "leaving.jsonl"
    path.write_text("no entry\n")
    with pytest.raises(CheckpointError, match="its last line is no entry; was it edited"):
        Ledger(path)


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be kept"):
        Ledger(tmp_path / "file" / "leaving.jsonl")
