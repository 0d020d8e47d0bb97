"""What leaves is said before: name by name, byte by byte, and it is what then leaves."""

import json

from sheepfold.config import build
from sheepfold.messages import Wire
from sheepfold.node.leaving import leaving, text
from sheepfold.strategies.scaffold import VARIATE
from sheepfold.wire import blob
from sheepfold.wire.ends import Terms, written
from sheepfold.wire.packing import pack
from tests.wire.samples import a_handed, an_answer

EXPERIMENT = build({"federation": {"rounds": 7}})


def test_what_is_said_is_what_leaves():
    for wire in ("fp32", "bf16", "int8"):
        handed = a_handed(Wire(wire))
        told = leaving(handed, Terms(), EXPERIMENT)
        letter, _ = written(an_answer(handed), handed, Terms(), {})
        sent = {name: (tuple(t.shape), t.numel() * t.element_size()) for name, t in letter.tensors.items()}
        assert {item.name: (item.shape, item.bytes) for item in told.server_sees} == sent
        _, read = blob.read(pack(letter))
        assert {item.name for item in told.server_sees} | {"measured"} == read.keys()
        assert told.bytes_at_most == 7 * told.bytes_a_round


def test_what_stays_is_named_and_what_goes_beside_too():
    handed = a_handed()
    terms = Terms(
        private=lambda name: name.endswith("/B"),
        beside=lambda a: {VARIATE + "x": a_handed().adapter.extra["head"].shape},
    )
    told = leaving(handed, terms, EXPERIMENT)
    assert len(told.stays) == 2
    assert all(name.endswith("/B") for name in told.stays)
    assert not any(item.name.endswith("/B") for item in told.server_sees)
    assert any(item.name == "memory:variate/x" for item in told.server_sees)


def test_it_is_told_in_words_and_kept():
    told = leaving(a_handed(), Terms(), EXPERIMENT)
    kept = json.loads(told.as_json())
    assert kept["bytes_at_most"] == told.bytes_at_most
    assert kept["measurements"]["rows"] == "training rows here"
    words = text(told)
    assert "no rows, no tokens, no text" in words
    assert all(item.name in words for item in told.server_sees)
    assert f"and {len(told.server_sees) - 2} more" in text(told, most=2)
