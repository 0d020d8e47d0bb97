"""The algebra of adapters, against dense float64 oracles in numpy."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.adapter import (
    Adapter,
    Average,
    LoraPair,
    best_rank,
    from_tensors,
    mean,
    pad,
    stack,
    subtract,
    truncate,
)
from sheepfold.errors import AdapterMismatch

many = settings(max_examples=60, deadline=None)  # no deadline: a busy machine is no failure

SIZES = st.integers(1, 6)
SCALES = st.sampled_from([0.25, 1.0, 2.0, 16 / 3])
WEIGHTS = st.floats(0.01, 1000)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def pairs(draw, d_in=None, d_out=None, rank=None, scale=None, dtype=torch.float64):
    """One pair with normal entries; whatever is not given is drawn, ranks beyond both sides included."""
    numbers = torch.Generator().manual_seed(draw(SEEDS))
    r, a, b = rank or draw(st.integers(1, 8)), d_in or draw(SIZES), d_out or draw(SIZES)
    A = torch.randn(r, a, generator=numbers, dtype=torch.float64).to(dtype)
    B = torch.randn(b, r, generator=numbers, dtype=torch.float64).to(dtype)
    return LoraPair(A, B, scale or draw(SCALES))


@st.composite
def cohorts(draw, mixed=False, dtype=torch.float64):
    """[(pair, weight)] of one shape; ranks and scales are each client's own where `mixed`."""
    d_in, d_out = draw(SIZES), draw(SIZES)
    shared = {} if mixed else {"rank": draw(st.integers(1, 4)), "scale": draw(SCALES)}
    one = st.tuples(pairs(d_in, d_out, **shared, dtype=dtype), WEIGHTS)
    return draw(st.lists(one, min_size=1, max_size=5))


def adapters(cohort):
    """The cohort as adapters of two modules and a head."""
    return [
        (Adapter({"q": p, "v": LoraPair(-p.A, 2 * p.B, p.scale)}, {"head": p.A[0]}), weight) for p, weight in cohort
    ]


def dense(pair):
    return pair.scale * pair.B.double().numpy() @ pair.A.double().numpy()


def weighted(arrays, weights):
    return sum(w * a for a, w in zip(arrays, weights, strict=True)) / sum(weights)


def close(found, expected, tolerance=1e-9):
    found = found.double().numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, expected, atol=tolerance * (1 + np.abs(expected).max(initial=0)), rtol=0)


def same(left, right):
    assert left.tensors().keys() == right.tensors().keys()
    for name, tensor in left.tensors().items():
        torch.testing.assert_close(tensor, right.tensors()[name], atol=1e-9, rtol=1e-9)


@many
@given(pairs())
def test_delta_and_norm_are_those_of_the_dense_update(pair):
    close(pair.delta(), dense(pair))
    assert pair.norm() == pytest.approx(np.linalg.norm(dense(pair)), rel=1e-6, abs=1e-6)
    assert pair.delta(torch.float32).dtype == torch.float32


@many
@given(cohorts())
def test_the_mean_is_the_weighted_mean_of_every_factor(cohort):
    found, weights = mean(adapters(cohort)), [w for _, w in cohort]
    close(found.pairs["q"].A, weighted([p.A.numpy() for p, _ in cohort], weights))
    close(found.pairs["v"].B, weighted([2 * p.B.numpy() for p, _ in cohort], weights))
    close(found.extra["head"], weighted([p.A[0].numpy() for p, _ in cohort], weights))
    assert found.pairs["q"].scale == cohort[0][0].scale


@many
@given(cohorts(), st.floats(1e-3, 1e3), st.randoms())
def test_order_of_arrival_and_scale_of_weights_leave_the_mean_alone(cohort, factor, random):
    moved = [(a, w * factor) for a, w in adapters(cohort)]
    random.shuffle(moved)
    same(mean(moved), mean(adapters(cohort)))


@many
@given(pairs(dtype=torch.float32), st.lists(WEIGHTS, min_size=1, max_size=6))
def test_equal_clients_return_themselves_to_the_bit(pair, weights):
    adapter = Adapter({"q": pair}, {"head": pair.B})
    assert mean((adapter, w) for w in weights).hash() == adapter.hash()


@many
@given(cohorts())
def test_a_client_of_weight_zero_does_not_count(cohort):
    joined = [*adapters(cohort), (adapters(cohort)[0][0], 0.0)]
    assert mean(joined).hash() == mean(adapters(cohort)).hash()


@many
@given(cohorts(dtype=torch.float32))
def test_float32_factors_give_the_float64_sum_up_to_its_last_bit(cohort):
    found = mean(adapters(cohort)).pairs["q"].A
    total = sum(p.A.double() * w for p, w in cohort) / sum(w for _, w in cohort)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, total.float(), rtol=1.2e-7, atol=1e-12)  # ties of the last bit may go either way


def test_a_long_sum_in_half_precision_does_not_drift():
    pair = LoraPair(torch.full((1, 2), 0.1, dtype=torch.float16), torch.ones(2, 1, dtype=torch.float16), 1.0)
    found = mean((Adapter({"q": pair}), 1.0) for _ in range(5000)).pairs["q"].A
    assert torch.equal(found, pair.A.float())


@many
@given(cohorts(mixed=True))
def test_the_stack_is_the_weighted_mean_of_the_updates_for_any_ranks_and_scales(cohort):
    found = stack(cohort)
    close(found.delta(), weighted([dense(p) for p, _ in cohort], [w for _, w in cohort]))
    assert found.rank == sum(p.rank for p, _ in cohort)


@many
@given(cohorts(mixed=True), st.integers(1, 8), SCALES)
def test_best_rank_is_as_near_as_any_pair_of_that_rank_can_be(cohort, rank, scale):
    whole = stack(cohort)
    found = best_rank(whole, rank, scale)
    U, S, Vh = np.linalg.svd(dense(whole))
    k = min(rank, len(S))
    close(found.delta(), (U[:, :k] * S[:k]) @ Vh[:k] if _gap(S, k) else dense(found), 1e-7)
    error = np.linalg.norm(dense(found) - dense(whole))
    assert error == pytest.approx(np.linalg.norm(S[k:]), rel=1e-6, abs=1e-7 * (1 + S[0]))  # Eckart-Young
    assert (found.rank, found.scale) == (rank, scale)


def _gap(S, k):
    """Whether the best approximation is unique, and numerically so."""
    return k == len(S) or S[k - 1] - S[k] > 1e-3 * (S[0] + 1e-9)


@many
@given(pairs(), st.integers(0, 5))
def test_padding_changes_neither_update_nor_scale_and_truncating_takes_it_back(pair, more):
    padded = pad(pair, pair.rank + more)
    assert padded.rank == pair.rank + more
    close(padded.delta(), dense(pair))
    back = truncate(padded, pair.rank)
    assert Adapter({"q": back}).hash() == Adapter({"q": pair}).hash()


@many
@given(pairs(), st.data())
def test_truncating_keeps_the_first_terms_of_the_sum(pair, data):
    rank = data.draw(st.integers(1, pair.rank))
    A, B = pair.A.numpy(), pair.B.numpy()
    close(truncate(pair, rank).delta(), pair.scale * sum(np.outer(B[:, i], A[i]) for i in range(rank)))


@many
@given(pairs(d_in=3, d_out=4), pairs(d_in=3, d_out=4))
def test_a_difference_is_the_difference_of_the_updates(left, right):
    close(subtract(left, right).delta(), dense(left) - dense(right))
    close(subtract(left, left).delta(), np.zeros((4, 3)))


@many
@given(cohorts(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_an_adapter_goes_through_its_tensors_unchanged(cohort, dtype):
    adapter = adapters(cohort)[0][0].to(dtype)
    back = from_tensors(adapter.tensors(), {name: pair.scale for name, pair in adapter.pairs.items()})
    assert back.hash() == adapter.hash()
    assert adapter.nbytes() == sum(t.numel() * t.element_size() for t in adapter.tensors().values())
    assert adapter.ranks == {"q": cohort[0][0].rank, "v": cohort[0][0].rank}


@many
@given(pairs(rank=2))
def test_the_hash_sees_bits_scales_names_shapes_and_dtypes(pair):
    def nudged(t):
        return torch.nextafter(t, torch.full_like(t, torch.inf))

    adapter = Adapter({"q": pair})
    others = [
        Adapter({"q": LoraPair(nudged(pair.A), pair.B, pair.scale)}),
        Adapter({"q": LoraPair(pair.A, nudged(pair.B), pair.scale)}),
        Adapter({"q": LoraPair(pair.A, pair.B, pair.scale * 2)}),
        Adapter({"v": pair}),
        Adapter({"q": pad(pair, 3)}),
        Adapter({"q": pair}, {"head": pair.A}),
        adapter.to(torch.float32),
    ]
    hashes = {adapter.hash(), *(other.hash() for other in others)}
    assert len(hashes) == 1 + len(others)
    assert Adapter({"q": LoraPair(pair.A.clone(), pair.B.clone(), pair.scale)}).hash() == adapter.hash()


def test_the_hash_does_not_depend_on_the_order_of_modules_or_on_memory_layout():
    a, b = LoraPair(torch.ones(1, 3), torch.ones(2, 1), 1.0), LoraPair(torch.zeros(1, 3), torch.ones(2, 1), 1.0)
    strided = LoraPair(torch.ones(3, 1).T, torch.ones(2, 1), 1.0)
    assert Adapter({"q": a, "v": b}).hash() == Adapter({"v": b, "q": strided}).hash()


def test_moving_dtype_leaves_integers_alone_and_finite_means_every_number():
    adapter = Adapter({"q": LoraPair(torch.ones(1, 3), torch.ones(2, 1), 1.0)}, {"steps": torch.tensor([3])})
    assert adapter.to(torch.float64).extra["steps"].dtype == torch.int64
    assert adapter.is_finite()
    for broken in (torch.inf, torch.nan):
        assert not Adapter({"q": LoraPair(torch.full((1, 3), broken), torch.ones(2, 1), 1.0)}).is_finite()


def pair_of(rank, scale=2.0):
    return LoraPair(torch.ones(rank, 3), torch.ones(2, rank), scale)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Adapter({"q": pair_of(3)}),
            r"ward-7, q/A: shape \(3, 3\), expected \(2, 3\); .*flora and flexlora accept mixed",
        ),
        (Adapter({"q": pair_of(2, 1.0)}), r"ward-7, q: alpha / r is 1.0, expected 2.0"),
        (Adapter({"v": pair_of(2)}), r"ward-7: q/A is in one adapter only"),
        (Adapter({"q": pair_of(2)}, {"head": torch.ones(1)}), r"ward-7: head/extra is in one adapter only"),
    ],
)
def test_a_mean_refuses_adapters_that_differ_and_says_how(other, message):
    average = Average()
    average.add(Adapter({"q": pair_of(2)}), 1.0, "ward-1")
    with pytest.raises(AdapterMismatch, match=message):
        average.add(other, 1.0, "ward-7")
    assert average.finish().hash() == Adapter({"q": pair_of(2)}).hash()  # what was refused left no trace


def test_nothing_has_no_mean_and_no_stack():
    with pytest.raises(AdapterMismatch, match="nothing to average"):
        mean([])
    with pytest.raises(AdapterMismatch, match="nothing to average"):
        mean([(Adapter({"q": pair_of(2)}), 0.0)])
    with pytest.raises(AdapterMismatch, match="nothing to stack"):
        stack([])


def test_ranks_out_of_reach_are_refused():
    with pytest.raises(AdapterMismatch, match=r"rank 4 cannot be padded to 3; truncate it"):
        pad(pair_of(4), 3)
    for rank in (0, 3):
        with pytest.raises(AdapterMismatch, match=f"rank 2 cannot be truncated to {rank}"):
            truncate(pair_of(2), rank)
    with pytest.raises(AdapterMismatch, match="rank 0: must be at least 1"):
        best_rank(pair_of(2), 0)


def test_adapters_are_values():
    with pytest.raises(FrozenInstanceError):
        pair_of(1).scale = 3.0
    pair = pair_of(2)
    truncate(pair, 1).A.zero_()
    mean([(Adapter({"q": pair}), 1.0)]).pairs["q"].A.zero_()
    assert torch.equal(pair.A, torch.ones(2, 3))
