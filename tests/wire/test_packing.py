"""Messages come back from their bytes as they were, and their bytes are as many as were counted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from sheepfold.adapter import Adapter
from sheepfold.errors import WireError
from sheepfold.messages import Absence, Update, Wire
from sheepfold.state import ServerState
from sheepfold.wire import blob
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import Terms, written
from sheepfold.wire.packing import Letter, absence_bytes, compact, going_down, pack, pack_absence, sent_bytes
from sheepfold.wire.unpacking import unpack_assignment, unpack_letter
from tests.wire.samples import FORMATS, a_handed, a_pair, adapters, an_answer, assignments, measured, mine

EXACT = Wire("fp32", "fp32")


def same(left: Adapter, right: Adapter) -> None:
    assert left.hash() == right.hash()


@settings(max_examples=50)
@given(assignments(EXACT))
def test_an_assignment_comes_back_to_the_bit(handed):
    read = unpack_assignment(pack(handed), mine(handed))
    same(read.adapter, handed.adapter)
    same(read.side, handed.side)
    same(Adapter(extra=read.memory), Adapter(extra=handed.memory))
    for field in ("client", "round", "lr", "first_step", "frozen", "known", "wire"):
        assert getattr(read, field) == getattr(handed, field)


@settings(max_examples=50)
@given(assignments(EXACT), st.integers(0, 10**6))
def test_an_update_comes_back_to_the_bit(handed, seed):
    kept = sorted(handed.trained(lambda name: False))[::3]
    terms = Terms(private=kept.__contains__, beside=None)
    answer = replace(an_answer(handed, seed, private=terms.private), memory={"count": torch.arange(3.0)})
    letter, own = written(answer, handed, terms, {})
    back = Desk([handed], terms).take(handed.client, pack(letter))
    assert isinstance(back, Update), back
    assert not own
    same(back.adapter, answer.adapter)
    same(Adapter(extra=back.memory), Adapter(extra=answer.memory))
    assert (back.measurements, back.unsent) == (answer.measurements, answer.unsent)
    assert back.sent_bytes == len(pack(letter)) == letter.sent_bytes == sent_bytes(answer, "fp32", handed.round)


@settings(max_examples=50)
@given(assignments())
def test_the_bytes_of_messages_are_counted_without_making_them(handed):
    assert sent_bytes(handed) == len(pack(handed)) == len(Desk([handed], Terms()).blob(handed.client))
    answer = an_answer(handed)
    letter, _ = written(answer, handed, Terms(), {})
    assert sent_bytes(answer, handed.wire.up, handed.round) == letter.sent_bytes == len(pack(letter))


@settings(max_examples=50)
@given(assignments())
def test_what_a_client_unpacks_is_what_the_simulation_gives_it(handed):
    desk = Desk([handed], Terms())
    read, received = unpack_assignment(desk.blob(handed.client), mine(handed)), desk.received(handed.client)
    same(read.adapter, received.adapter)
    same(read.side, received.side)
    same(Adapter(extra=read.memory), Adapter(extra=received.memory))


def test_an_absence_comes_back():
    gone = Absence("ann", "no good step in 3: the loss was nan", 3)
    data = pack_absence(gone, 7)
    assert unpack_letter(data) == (replace(gone, sent_bytes=len(data)), 7)
    assert absence_bytes(gone, 7) == len(data)


@settings(max_examples=20)
@given(adapters())
def test_any_safetensors_library_reads_a_blob(adapter):
    data = blob.write({"a": 1}, adapter.tensors())
    same(Adapter(extra=load(data)), Adapter(extra=adapter.tensors()))


def test_a_side_travels_as_the_smaller_of_factors_and_product():
    fat = Adapter({"layers.0.q_proj": a_pair(5, 0, scale=0.5)})
    side = compact(fat)
    torch.testing.assert_close(side.pairs["layers.0.q_proj"].delta(), fat.pairs["layers.0.q_proj"].delta())
    assert compact(side) is side
    sent = going_down(a_handed(side=side))
    assert sent["side:layers.0.q_proj/dense"].shape == (5, 7)


@given(st.binary(max_size=300))
def test_noise_is_refused_in_one_line(data):
    with pytest.raises(WireError, match=r"^not a message of ours: ") as refused:
        blob.read(data)
    assert "\n" not in str(refused.value)


GOOD = pack(a_handed())


@settings(max_examples=60)
@given(st.integers(0, len(GOOD) - 1))
def test_a_message_cut_anywhere_is_refused(length):
    with pytest.raises(WireError):
        blob.read(GOOD[:length])


@settings(max_examples=80)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_nothing(place, by):
    broken = bytearray(GOOD)
    broken[place] ^= by
    handed = a_handed()
    try:
        read = unpack_assignment(bytes(broken), mine(handed))
    except WireError as error:
        assert "\n" not in str(error)  # noqa: PT017, either is fine
    else:  # a number of the head, such as the round, reads well; the transport's own checks guard it
        same(Adapter(extra=read.adapter.tensors()), Adapter(extra=handed.adapter.tensors()))


def test_a_client_refuses_modules_that_it_does_not_have():
    handed = a_handed()
    other = Adapter({"layers.0.q_proj": a_pair(4, 0)}, {"head": torch.zeros(3, 4)})
    with pytest.raises(WireError, match=r"adapts layers.0.v_proj, which this client's own adapter does not"):
        unpack_assignment(pack(handed), other)


def test_a_message_of_another_run_is_refused():
    with pytest.raises(WireError, match="a message of run 'other', expected 0000"):
        unpack_assignment(pack(a_handed(), run="other"), mine(a_handed()))


@pytest.mark.parametrize("wire", FORMATS)
def test_narrow_formats_are_smaller(wire):
    handed = a_handed(Wire(wire, wire), rank=4)
    wide = {"big": torch.randn(64, 512)}
    handed = replace(handed, adapter=Adapter(extra=wide))
    share = sent_bytes(handed) / sent_bytes(replace(handed, wire=EXACT))
    assert share == pytest.approx({"fp32": 1.0, "bf16": 0.5, "int8": 0.25}[wire], abs=0.02)


def test_letters_are_of_one_run():
    letter = Letter("ann", 3, "fp32", {}, {}, measured(), run="f" * 16)
    assert unpack_letter(pack(letter), "f" * 16)[0].run == "f" * 16
    with pytest.raises(WireError, match="it was sent before this run began"):
        unpack_letter(pack(letter))


def test_a_state_is_no_message():
    assert ServerState  # states are safetensors files too, with another head
    with pytest.raises(WireError, match="a message of format None, expected 1"):
        unpack_letter(blob.write({"round": 3}, {}))
