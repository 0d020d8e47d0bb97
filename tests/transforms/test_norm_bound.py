"""A bound on an update's norm: clients keep it, and what folds is never longer."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.messages import Absence, Update, Wire
from sheepfold.transforms.norm_bound import norm_bound
from sheepfold.transforms.wire_dtype import wire_dtype
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import Terms, written
from tests.wire.samples import a_handed, an_answer


def bounded(bound: float) -> Terms:
    return Terms((norm_bound(bound), wire_dtype()))


def length(handed, update: Update) -> float:
    """Return the norm of an update's change, by numpy."""
    start, now = handed.adapter.tensors(), update.adapter.tensors()
    return float(np.sqrt(sum(((now[n].double() - start[n].double()).numpy() ** 2).sum() for n in start)))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(1e-3, 10), st.sampled_from(["fp32", "bf16", "int8"]), st.integers(1, 4))
def test_what_folds_is_never_longer_than_the_bound(seed, bound, wire, rounds):
    own, terms = {}, bounded(bound)
    for round in range(rounds):
        handed = a_handed(Wire(wire, "fp32"), round=round)
        letter, own = written(an_answer(handed, seed + round, 1.0), handed, terms, own)
        arrived = Desk([handed], terms).admit("ann", letter)
        assert isinstance(arrived, Update), arrived
        assert length(handed, arrived) <= bound * (1 + 1e-5) + 2e-6


def test_a_client_shortens_its_change_and_keeps_its_direction():
    handed = a_handed()
    answer = an_answer(handed)
    letter, _ = written(answer, handed, bounded(0.25), {})
    arrived = Desk([handed], bounded(0.25)).admit("ann", letter)
    share = 0.25 / length(handed, answer)
    for name, start in handed.adapter.tensors().items():
        expected = start.double() + share * (answer.adapter.tensors()[name].double() - start)
        np.testing.assert_allclose(arrived.adapter.tensors()[name].numpy(), expected.numpy(), rtol=0, atol=1e-6)


def test_a_change_within_the_bound_passes_to_the_bit():
    handed = a_handed()
    answer = an_answer(handed)
    letter, _ = written(answer, handed, bounded(1e6), {})
    assert Desk([handed], bounded(1e6)).admit("ann", letter).adapter.hash() == answer.adapter.hash()


def test_a_client_that_does_not_keep_the_bound_is_absent_with_the_reason():
    handed = a_handed()
    letter, _ = written(an_answer(handed), handed, Terms(), {})
    answer = Desk([handed], bounded(0.01)).admit("ann", letter)
    assert isinstance(answer, Absence)
    assert answer.reason.startswith("rejected: the norm of its change is ")
    assert answer.reason.endswith("expected at most 0.01 (federation.norm_bound)")


def test_what_travels_beside_the_adapter_counts_too():
    handed = a_handed()
    terms = replace(bounded(0.01), beside=None)
    answer = replace(an_answer(handed, size=0.0), memory={"x": handed.adapter.extra["head"]})
    letter, _ = written(answer, handed, terms, {})
    with_it = Desk([handed], terms).admit("ann", letter)
    assert float(with_it.memory["x"].norm()) == pytest.approx(0.01, rel=1e-4)
