"""Number formats and error feedback: what is lost, what is carried on, and what the server makes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.errors import WireError
from sheepfold.messages import Update, Wire
from sheepfold.transforms.wire_dtype import KEPT, wire_dtype
from sheepfold.wire.desk import Desk
from sheepfold.wire.dtypes import as_rows
from sheepfold.wire.ends import Terms, written
from sheepfold.wire.packing import ADAPTER
from tests.wire.samples import a_handed, an_answer

INT8, BF16 = Wire("int8", "fp32"), Wire("bf16", "fp32")
WITHOUT = Terms((wire_dtype(feedback=False),))


def over(handed, answer, terms=Terms(), own=()) -> tuple[Update, dict[str, torch.Tensor]]:
    """Return an update as it arrives, and what its client keeps."""
    letter, keep = written(answer, handed, terms, dict(own))
    arrived = Desk([handed], terms).admit("ann", letter)
    assert isinstance(arrived, Update), arrived
    return arrived, keep


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1e-2, 10.0]))
def test_int8_loses_a_254th_of_the_largest_change_in_a_row(seed, size):
    handed = a_handed(INT8)
    answer = an_answer(handed, seed, size)
    arrived, _ = over(handed, answer)
    start = handed.adapter.tensors()
    for name, meant in answer.adapter.tensors().items():
        change, lost = meant.double() - start[name], meant.double() - arrived.adapter.tensors()[name]
        bound = as_rows(change).abs().amax(1, keepdim=True) / 254
        rounding = 2.0**-23 * float(meant.abs().max())  # of the sum in float32
        assert (as_rows(lost).abs() <= bound * (1 + 1e-4) + rounding).all(), name


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_the_sum_of_what_was_sent_follows_the_sum_of_what_was_meant(seed, rounds):
    """It is apart by what the last round lost, however many rounds there were; an oracle in numpy adds up."""
    own, meant, came, largest = {}, {}, {}, {}
    for round in range(rounds):
        handed = a_handed(INT8, round=round)
        answer = an_answer(handed, seed + round)
        arrived, own = over(handed, answer, own=own)
        for name, t in handed.adapter.tensors().items():
            start = t.double().numpy()
            change = answer.adapter.tensors()[name].double().numpy() - start
            meant[name] = meant.get(name, 0.0) + change
            came[name] = came.get(name, 0.0) + arrived.adapter.tensors()[name].double().numpy() - start
            largest[name] = max(largest.get(name, 0.0), float(np.abs(change).max()))
    for name, total in meant.items():
        # a change and the feedback in it are at most 1 + 1/254 + ... of the largest change
        assert np.abs(total - came[name]).max() <= 1.01 * largest[name] / 254 + rounds * 1e-6
        lost = own[KEPT + ADAPTER + name].double().numpy()
        np.testing.assert_allclose(total - came[name], lost, rtol=0, atol=rounds * 1e-6)


def test_without_feedback_a_small_change_beside_a_large_one_never_arrives():
    """The same change every round: 1 in one place, a 300th in another, which rounds to nothing."""
    handed = a_handed(INT8)
    change = torch.zeros(3, 4)
    change[0, 0], change[0, 1] = 1.0, 1 / 300
    moved = handed.adapter.holding({"head/extra": handed.adapter.extra["head"] + change})
    answer = replace(an_answer(handed, size=0.0), adapter=moved)

    def after(terms: Terms) -> torch.Tensor:
        own, total = {}, torch.zeros(3, 4)
        for _ in range(40):
            arrived, own = over(handed, answer, terms, own)
            total += arrived.adapter.extra["head"] - handed.adapter.extra["head"]
        return total[0, 1] / 40

    assert float(after(WITHOUT)) == 0.0
    assert float(after(Terms())) == pytest.approx(1 / 300, rel=0.1)


def test_exact_numbers_pass_as_they_are_and_nothing_is_kept():
    handed = a_handed()
    answer = an_answer(handed)
    arrived, own = over(handed, answer)
    assert arrived.adapter.hash() == answer.adapter.hash()
    assert not own


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_bfloat16_rounds_each_change(seed):
    handed = a_handed(BF16)
    answer = an_answer(handed, seed)
    arrived, own = over(handed, answer)
    assert not own
    start = handed.adapter.tensors()
    for name, meant in answer.adapter.tensors().items():
        lost = meant.double() - arrived.adapter.tensors()[name].double()
        assert (lost.abs() <= (meant.double() - start[name]).abs() / 256 + 1e-6).all()


@pytest.mark.parametrize("down", ["bf16", "int8"])
@pytest.mark.parametrize("up", ["fp32", "bf16", "int8"])
def test_what_a_client_was_handed_less_exactly_never_enters_the_state(up, down):
    """A client that changes nothing leaves the server where it was, whatever it saw."""
    handed = a_handed(Wire(up, down))
    desk = Desk([handed], Terms())
    received = desk.received("ann")
    assert received.adapter.hash() != handed.adapter.hash()
    letter, _ = written(an_answer(received, size=0.0), received, Terms(), {})
    assert desk.admit("ann", letter).adapter.hash() == handed.adapter.hash()


def test_what_is_kept_is_forgotten_where_a_tensor_has_another_shape():
    wide = {f"{KEPT}{ADAPTER}head/extra": torch.ones(9, 9)}
    handed = a_handed(INT8)
    answer = an_answer(handed)
    assert over(handed, answer, own=wide)[0].adapter.hash() == over(handed, answer)[0].adapter.hash()


def test_numbers_that_are_not_finite_do_not_become_int8():
    handed = a_handed(INT8)
    bad = an_answer(handed).adapter.holding({"head/extra": torch.full((3, 4), float("inf"))})
    with pytest.raises(WireError, match="adapter:head/extra is not finite, and cannot travel as int8"):
        written(replace(an_answer(handed), adapter=bad), handed, Terms(), {})
