"""What a hostile or broken client sends is rejected with its reason; nobody else is touched, and memory stays small."""

import json
import re
import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.messages import Absence, Update, Wire
from sheepfold.metrics import Mean
from sheepfold.strategies.fedavg import fedavg
from sheepfold.transforms.norm_bound import norm_bound
from sheepfold.transforms.wire_dtype import wire_dtype
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import Terms, written
from sheepfold.wire.packing import Letter, pack, pack_absence
from tests.strategies.cohorts import a_state
from tests.wire.samples import PATHS, a_handed, an_answer, measured

TERMS = Terms((norm_bound(50.0), wire_dtype()))
Q = PATHS[0]
A, B = f"adapter:{Q}/A", f"adapter:{Q}/B"


def honest(client: str = "ann", wire: Wire = Wire()) -> Letter:
    handed = a_handed(wire, client=client)
    return written(an_answer(handed), handed, TERMS, {})[0]


def with_tensors(letter: Letter, **over: torch.Tensor | None) -> Letter:
    """Return a letter with some tensors replaced, or left out where they are None."""
    tensors = {**letter.tensors, **{name.replace("__", ":"): t for name, t in over.items()}}
    return replace(letter, tensors={name: t for name, t in tensors.items() if t is not None})


def judged(data: bytes, sender: str = "ann", terms: Terms = TERMS, wire: Wire = Wire()) -> Update | Absence:
    answer = Desk([a_handed(wire, client="ann"), a_handed(wire, client="mallory")], terms).take(sender, data)
    assert answer is not None
    return answer


def changed(name: str, tensor: torch.Tensor | None, letter: Letter | None = None) -> bytes:
    letter = letter or honest()
    tensors = {n: t for n, t in {**letter.tensors, name: tensor}.items() if t is not None}
    return pack(replace(letter, tensors=tensors))


def rank_9() -> bytes:
    letter = honest()
    return pack(replace(letter, tensors={**letter.tensors, A: torch.zeros(9, 7), B: torch.zeros(5, 9)}))


def a_header(entries: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + body


NAN = torch.full((4, 7), float("nan"))
TWICE = '{"__metadata__":{"sheepfold":"{}"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32"}}'
CASES = {
    "wrong shape": (lambda: changed(A, torch.zeros(4, 8)), rf"{A}: shape \(4, 8\), expected \(4, 7\)"),
    "a tensor left out": (lambda: changed(A, None), rf"an update without {A}, and 0 more"),
    "a tensor nobody asked for": (lambda: changed("adapter:x/A", NAN), r"'adapter:x/A', which nobody asked for"),
    "a pair nobody asked for": (lambda: changed("adapter:x/extra", NAN), r"'adapter:x/extra', which nobody asked for"),
    "no part of a message": (lambda: changed("x", NAN), r"with 'x', which nobody asked for"),
    "something beside the adapter": (lambda: changed("memory:x", NAN), r"'memory:x', which nobody asked for"),
    "another number format": (lambda: changed(A, NAN.half()), rf"{A}: float16, expected float32"),
    "whole numbers": (lambda: changed(A, torch.zeros(4, 7, dtype=torch.int64)), rf"{A}: int64, expected float32"),
    "nan": (lambda: changed(A, NAN), rf"{A}: 28 of 28 numbers are not finite"),
    "an infinity": (lambda: changed(A, torch.full((4, 7), float("inf"))), rf"{A}: 28 of 28 numbers are not finite"),
    "a huge norm": (lambda: changed(A, torch.full((4, 7), 1e30)), r"its change is 5\.\d+e\+30, expected at most"),
    "another rank": (rank_9, rf"{Q}: rank 9, expected 4"),
    "another scale": (
        lambda: pack(replace(honest(), scales=dict.fromkeys(PATHS[:2], 1e9))), r"scale 1e\+09, expected 2"
    ),
    "truncated": (lambda: pack(honest())[:-5], r"it is truncated: "),
    "cut in its header": (lambda: pack(honest())[:100], r"it is truncated: its header claims"),
    "nothing": (lambda: b"", r"it ends after 0 bytes"),
    "a header of 10 GB": (lambda: struct.pack("<Q", 10**10) + b"{}", r"its header claims 10,000,000,000 bytes"),
    "a tensor of 10 GB": (
        lambda: a_header(
            '{"__metadata__":{"sheepfold":"{}"},"a":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'
        ),
        r"it is truncated: a ends at 10,000,000,000",
    ),
    "more than anyone asked for": (lambda: changed("adapter:x/A", torch.zeros(2**20)), r"bytes, expected at most"),
    "one name twice": (lambda: a_header(TWICE), r"'a' is there twice"),
    "deep nesting": (lambda: a_header("[" * 100_000), r"its header is not JSON"),
    "a pickle": (lambda: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os", r"its header claims"),
    "another's name": (lambda: pack(replace(honest(), client="bob")), r"an update in the name of 'bob'"),
    "an earlier round": (lambda: pack(replace(honest(), round=2)), r"an update of round 3, expected round 4"),
    "another run": (lambda: pack(replace(honest(), run="1" * 16)), r"a message of run '1111111111111111'"),
    "another format of numbers": (lambda: pack(honest(wire=Wire("bf16"))), r"an update in bf16, expected fp32"),
    "its own assignment": (lambda: pack(a_handed()), r"its message is 'assignment', expected update or absence"),
    "an absence for another": (lambda: pack_absence(Absence("bob", "gone"), 3), r"an absence of 'bob' in round 4"),
    "no rows": (lambda: pack(replace(honest(), measurements=measured(rows=0))), r"steps on 0 rows"),
    "fewer rows than none": (lambda: pack(replace(honest(), measurements=measured(rows=-5))), r"at least 0"),
    "half a step": (lambda: pack(replace(honest(), measurements=measured(steps=0.5))), r"count in fractions"),
    "a loss that is none": (
        lambda: pack(replace(honest(), measurements=measured(loss=Mean(float("nan"), 1.0)))),
        r"no numbers of"
    ),
    "a loss that no sum has room for": (
        lambda: pack(replace(honest(), measurements=measured(loss=Mean(-1e308, 1.0)))),
        r"a loss of -1e\+308, which no sum has room for"
    ),
    "more seconds than there were": (
        lambda: pack(replace(honest(), measurements=measured(seconds={"forward": 1e308}))), r"no numbers of"
    ),
    "seconds of the server's own": (
        lambda: pack(replace(honest(), measurements=measured(seconds={"round": 1.0}))),
        r"the seconds of 'round', which no engine has"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_update_is_an_absence_with_its_reason(case):
    made, why = CASES[case]
    answer = judged(made())
    assert isinstance(answer, Absence)
    assert answer.client == "ann"
    assert answer.reason.startswith("rejected: ")
    assert "\n" not in answer.reason
    assert len(answer.reason) < 500
    assert re.search(why, answer.reason), answer.reason


def test_a_reason_is_one_plain_line_whatever_the_message_called_its_tensors():
    name = "\x1b[2J\ud800" + "x" * 10_000
    entry = {"dtype": "Q", "shape": [1], "data_offsets": [0, 1]}
    answer = judged(a_header(json.dumps({"__metadata__": {"sheepfold": "{}"}, name: entry})))
    assert answer.reason.startswith("rejected: not a message of ours: ")
    assert len(answer.reason) < 500
    assert answer.reason.isprintable()
    excuse = judged(pack_absence(Absence("ann", "gone\x1b[2J \ud800"), 3))
    assert excuse.reason.isprintable()
    excuse.reason.encode()


def test_an_honest_update_is_taken():
    answer = judged(pack(honest()))
    assert isinstance(answer, Update), answer


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_narrow_numbers_are_judged_as_they_come(wire):
    letter = honest(wire=Wire(wire))
    assert isinstance(judged(pack(letter), wire=Wire(wire)), Update)
    answer = judged(pack(replace(honest(), wire=wire)), wire=Wire(wire))
    assert answer.reason.startswith("rejected: ")
    if wire == "int8":
        scales = torch.full_like(letter.tensors[A + "#scales"], float("inf"))
        assert "are not finite" in judged(changed(A + "#scales", scales, letter), wire=Wire(wire)).reason
        short = letter.tensors[A + "#scales"][:2]
        assert "#scales: shape (2,)" in judged(changed(A + "#scales", short, letter), wire=Wire(wire)).reason


def test_a_replayed_update_counts_once_and_the_first_stands():
    desk = Desk([a_handed(client="ann")], TERMS)
    data = pack(honest())
    assert isinstance(desk.take("ann", data), Update)
    assert desk.take("ann", data) is None
    assert desk.left_out == [f"ann: a message of {len(data):,} bytes, though it has answered already"]


def test_who_was_not_asked_is_not_heard():
    desk = Desk([a_handed(client="ann")], TERMS)
    assert desk.take("eve", pack(honest("eve"))) is None
    assert desk.left_out[0].endswith("though it was asked for nothing")
    assert isinstance(desk.take("ann", pack(honest())), Update), "nobody else is touched"


def test_a_name_is_what_the_transport_says():
    answer = judged(pack(honest("ann")), sender="mallory")
    assert (answer.client, answer.reason) == (
        "mallory",
        "rejected: an update in the name of 'ann'; a client sends its own alone",
    )


def test_the_round_goes_on_without_a_bad_update_and_with_right_weights():
    clients = {"ann": 30, "bob": 10, "mallory": 5}
    ranks = {"q": 2, "v": 3}
    state = a_state(dict.fromkeys(clients, ranks))
    handed = [fedavg().assign(state, client, 1e-3) for client in clients]
    desk, answers = Desk(handed, TERMS), []
    for i, a in enumerate(handed):
        update = replace(an_answer(a, i), measurements=measured(rows=clients[a.client]))
        letter, _ = written(update, a, TERMS, {})
        if a.client == "mallory":
            letter = replace(letter, tensors={n: t * float("nan") for n, t in letter.tensors.items()})
        answers.append((update, desk.take(a.client, pack(letter))))
    good = [answer for _, answer in answers if isinstance(answer, Update)]
    assert [a.client for a in good] == ["ann", "bob"]
    folded = fedavg().fold(state, good)
    for name, t in folded.adapter.tensors().items():
        (first, _), (second, _), _ = answers
        expected = 0.75 * first.adapter.tensors()[name].double() + 0.25 * second.adapter.tensors()[name].double()
        torch.testing.assert_close(t.double(), expected, rtol=0, atol=1e-6)


def test_a_message_that_claims_much_costs_nothing():
    """Python's own allocations while the largest claims are judged: far below what is claimed."""
    tracemalloc.start()
    try:
        for case in ("a header of 10 GB", "a tensor of 10 GB"):
            judged(CASES[case][0]())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_nothing_of_a_message_is_kept():
    handed = [a_handed(client=f"c{i}") for i in range(30)]
    desk = Desk(handed, TERMS)
    for a in handed:
        desk.take(a.client, pack(written(an_answer(a), a, TERMS, {})[0]))
    assert not desk._rounded
    assert desk.heard == {a.client for a in handed}
    assert all(desk.most_bytes(a.client) < 2 * 2**20 for a in handed)


def test_ranks_may_shrink_only_where_the_strategy_takes_mixed_ones():
    handed = a_handed()
    pairs = {**handed.adapter.pairs, Q: LoraPair(torch.ones(2, 7), torch.ones(5, 2), 4.0)}
    small = replace(an_answer(handed), adapter=Adapter(pairs, handed.adapter.extra))
    mixed = replace(TERMS, may_shrink=True)
    data = pack(written(small, handed, mixed, {})[0])
    taken = judged(data, terms=mixed)
    assert isinstance(taken, Update), taken
    assert taken.adapter.pairs[Q].rank == 2
    assert judged(data).reason == f"rejected: {Q}: rank 2, expected 4"
