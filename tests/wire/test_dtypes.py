"""Number formats: bounds on what is lost, and sizes that are known before."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.wire.dtypes import as_rows, from_rows, narrowed, narrowed_specs, quantised, restored, widened

SHAPES = st.one_of(
    st.just(()), st.tuples(st.integers(0, 2500)), st.tuples(st.integers(0, 90), st.integers(0, 90)),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9)),
)  # fmt: skip


def drawn(shape, seed: int, size: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=draw).exp()
    return (torch.randn(shape, generator=draw) * spread * size).float()


@given(SHAPES, st.integers(0, 10**6), st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
def test_int8_is_within_a_254th_of_each_rows_largest_number(shape, seed, size):
    t = drawn(shape, seed, size)
    q, scales = quantised(t)
    back = restored(q, scales)
    assert q.shape == back.shape == t.shape
    rows, theirs = (as_rows(x).double().numpy() for x in (t, back))
    largest = np.abs(rows).max(1, initial=0.0)
    assert (np.abs(rows - theirs) <= largest[:, None] / 254 * (1 + 1e-4) + 2e-36).all()


@given(SHAPES, st.integers(0, 10**6))
def test_bfloat16_is_within_a_256th_of_every_number(shape, seed):
    t = drawn(shape, seed)
    back = widened(narrowed({"t": t}, "bf16"), "bf16")["t"]
    assert back.dtype == torch.float32
    assert ((t - back).abs() <= t.abs() / 256).all()


@given(SHAPES, st.sampled_from(["fp32", "bf16", "int8"]))
def test_what_travels_has_the_sizes_that_were_foreseen(shape, wire):
    tensors = {"a": drawn(shape, 0), "n": torch.arange(3), "h": torch.ones(4, dtype=torch.bfloat16)}
    specs = tuple((name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
    sent = narrowed(tensors, wire)
    assert {(n, t.dtype, tuple(t.shape)) for n, t in sent.items()} == set(narrowed_specs(specs, wire))
    assert widened(sent, wire).keys() == tensors.keys()
    assert torch.equal(sent["n"], tensors["n"]), "whole numbers travel as they are"


@given(SHAPES)
def test_rows_hold_every_number_once(shape):
    t = drawn(shape, 1)
    assert torch.equal(from_rows(as_rows(t), t.shape), t)
    assert as_rows(t).abs().double().sum() == t.abs().double().sum() or t.numel() > 1000


def test_the_columns_of_a_thin_matrix_share_a_scale_each():
    assert quantised(torch.ones(500, 8))[1].shape == (8,)
    assert quantised(torch.ones(8, 500))[1].shape == (8,)


def test_zeros_stay_zeros_and_so_does_what_is_too_small():
    for t in (torch.zeros(3, 70), torch.full((3, 70), 1e-40)):
        assert not restored(*quantised(t)).any()
