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
    SparseDelta,
    all_finite,
    combined,
    from_delta,
    from_tensors,
    kind,
    mean,
    pad,
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


def test_finite_numbers_may_have_a_sum_that_is_not_and_broken_ones_may_cancel():
    assert all_finite([torch.full((9,), 3e38), torch.tensor([7]), torch.empty(0, 4)])
    assert all_finite([])
    inf = torch.tensor([torch.inf, 1.0])
    assert not all_finite([inf, -inf])
    assert not all_finite([torch.ones(3), torch.full((9,), 3e38), torch.tensor([torch.nan], dtype=torch.bfloat16)])


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


def test_nothing_has_no_mean():
    with pytest.raises(AdapterMismatch, match="nothing to average"):
        mean([])
    with pytest.raises(AdapterMismatch, match="nothing to average"):
        mean([(Adapter({"q": pair_of(2)}), 0.0)])


def test_ranks_out_of_reach_are_refused():
    with pytest.raises(AdapterMismatch, match=r"rank 4 cannot be padded to 3; truncate it"):
        pad(pair_of(4), 3)
    for rank in (0, 3):
        with pytest.raises(AdapterMismatch, match=f"rank 2 cannot be truncated to {rank}"):
            truncate(pair_of(2), rank)


@st.composite
def changes(draw, d_in=5, d_out=4):
    """One module's change: a pair, a pair with a core, or a sparse delta; and the dense update it stands for."""
    numbers = np.random.default_rng(draw(SEEDS))
    if draw(st.booleans()):
        at = np.sort(numbers.permutation(d_in * d_out)[: draw(st.integers(1, d_in * d_out))])
        values, update = numbers.normal(size=len(at)), np.zeros(d_in * d_out)
        update[at] = values
        return SparseDelta(torch.from_numpy(values), torch.from_numpy(at), (d_out, d_in)), update.reshape(d_out, d_in)
    pair = draw(pairs(d_in, d_out))
    if draw(st.booleans()):
        return pair, dense(pair)
    core = torch.from_numpy(numbers.normal(size=(pair.rank, pair.rank)))
    cored = LoraPair(pair.A, pair.B, pair.scale, core)
    return cored, pair.scale * pair.B.numpy() @ core.numpy() @ pair.A.numpy()


def adapter_of(parts, extra=None):
    """An adapter of these changes by module, pairs and sparse deltas."""
    sparse = {path: change for path, change in parts.items() if isinstance(change, SparseDelta)}
    return Adapter({path: change for path, change in parts.items() if path not in sparse}, extra or {}, sparse)


@many
@given(changes())
def test_cores_and_sparse_deltas_are_pairs_of_the_same_update(change):
    found, expected = change
    close(found.delta(), expected)
    plain = adapter_of({"q": found}).plain()
    assert plain.pairs["q"].core is None
    assert not plain.sparse
    close(plain.pairs["q"].delta(), expected)
    assert plain.pairs["q"].norm() == pytest.approx(np.linalg.norm(expected), rel=1e-6, abs=1e-6)
    if isinstance(found, LoraPair):
        assert found.norm() == pytest.approx(np.linalg.norm(expected), rel=1e-6, abs=1e-6)
        assert plain.pairs["q"].rank == found.rank


@many
@given(st.lists(changes(), min_size=2, max_size=2), st.lists(changes(), min_size=2, max_size=2))
def test_combined_adapters_change_the_base_by_the_sum_of_both(ours, theirs):
    """Of what both change, and of what one of them changes alone."""
    left = adapter_of({"q": ours[0][0], "left": ours[1][0]})
    right = adapter_of({"q": theirs[0][0], "right": theirs[1][0]}, {"head": torch.ones(2)})
    both = combined(left, right)
    assert both.pairs.keys() == {"q", "left", "right"}
    close(both.pairs["q"].delta(), ours[0][1] + theirs[0][1])
    close(both.pairs["left"].delta(), ours[1][1])
    close(both.pairs["right"].delta(), theirs[1][1])
    assert both.pairs["q"].rank <= 4, "no larger than the matrix"
    assert torch.equal(both.extra["head"], right.extra["head"])
    assert not both.sparse
    assert all(pair.core is None for pair in both.pairs.values())


@many
@given(st.integers(1, 6), st.integers(1, 6), SEEDS)
def test_a_dense_update_goes_through_a_pair_to_the_bit(d_in, d_out, seed):
    dense = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    pair = from_delta(dense)
    assert pair.rank == min(d_in, d_out)
    assert torch.equal(pair.delta(torch.float32), dense)


@many
@given(st.dictionaries(st.sampled_from("abcd"), changes(), min_size=1))
def test_every_kind_of_change_goes_through_its_tensors_unchanged(drawn):
    adapter = adapter_of({path: change for path, (change, _) in drawn.items()}, {"head": torch.ones(2)})
    tensors = adapter.tensors()
    assert {kind(name) for name in tensors} <= {"A", "B", "core", "values", "positions", "extra"}
    assert list(tensors) == list(adapter.to().tensors()), "in a fixed order"
    again = from_tensors(
        tensors,
        {path: pair.scale for path, pair in adapter.pairs.items()},
        {path: list(sparse.shape) for path, sparse in adapter.sparse.items()},
    )
    assert again.hash() == adapter.hash()
    assert again.sparse.keys() == adapter.sparse.keys()
    narrow = adapter.to(torch.float32)
    assert all(
        t.dtype == (torch.int64 if kind(n) == "positions" else torch.float32) for n, t in narrow.tensors().items()
    )
    assert adapter.nbytes() == sum(t.numpy().nbytes for t in tensors.values())


def test_the_hash_sees_cores_positions_and_the_shape_they_lie_in():
    pair = LoraPair(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    cored = LoraPair(pair.A, pair.B, 1.0, torch.eye(2))
    values = torch.ones(2)
    sparse = SparseDelta(values, torch.tensor([0, 5]), (4, 3))
    adapters = [
        Adapter({"q": pair}),
        Adapter({"q": cored}),
        Adapter({"q": LoraPair(pair.A, pair.B, 1.0, 2 * torch.eye(2))}),
        Adapter(sparse={"q": sparse}),
        Adapter(sparse={"q": SparseDelta(values, torch.tensor([0, 4]), (4, 3))}),
        Adapter(sparse={"q": SparseDelta(values, torch.tensor([0, 5]), (3, 4))}),
    ]
    assert len({a.hash() for a in adapters}) == len(adapters)
    assert Adapter({"q": cored}).hash() == Adapter({"q": LoraPair(pair.A, pair.B, 1.0, torch.eye(2))}).hash()


def test_replacing_a_tensor_leaves_the_others_and_refuses_other_names():
    pair = LoraPair(torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.eye(2))
    sparse = SparseDelta(torch.ones(2), torch.tensor([0, 5]), (4, 3))
    adapter = Adapter({"q": pair}, {"head": torch.ones(2)}, {"v": sparse})
    other = adapter.holding({"q/core": torch.zeros(2, 2), "v/values": torch.zeros(2), "head/extra": torch.zeros(2)})
    assert other.pairs["q"].A is pair.A
    assert other.sparse["v"].positions is sparse.positions
    assert not any(t.any() for t in (other.pairs["q"].core, other.sparse["v"].values, other.extra["head"]))
    assert adapter.pairs["q"].core is pair.core
    for name in ("k/A", "q/values", "v/A", "head", "q"):
        with pytest.raises(KeyError):
            adapter.holding({name: torch.zeros(1)})


@many
@given(st.lists(st.tuples(SEEDS, WEIGHTS), min_size=1, max_size=4), st.integers(1, 12))
def test_the_mean_of_cores_and_of_sparse_values_is_the_mean_of_the_updates(clients, count):
    """Frames and positions are shared, so what is averaged is linear in the update."""
    frame = LoraPair(torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64), 0.5)
    at = torch.from_numpy(np.sort(np.random.default_rng(count).permutation(12)[:count]))

    def client(seed):
        draw = torch.Generator().manual_seed(seed)
        core = torch.randn(2, 2, generator=draw, dtype=torch.float64)
        values = torch.randn(count, generator=draw, dtype=torch.float64)
        return Adapter(
            {"q": LoraPair(frame.A, frame.B, 0.5, core)}, sparse={"v": SparseDelta(values, at.clone(), (3, 4))}
        )

    drawn = [(client(seed), weight) for seed, weight in clients]
    found, weights = mean(drawn), [w for _, w in clients]
    close(found.pairs["q"].delta(), weighted([a.pairs["q"].delta().numpy() for a, _ in drawn], weights))
    close(found.sparse["v"].delta(), weighted([a.sparse["v"].delta().numpy() for a, _ in drawn], weights))
    assert torch.equal(found.sparse["v"].positions, at)


def test_a_mean_over_other_positions_is_refused_by_name():
    average = Average()
    average.add(Adapter(sparse={"q": SparseDelta(torch.ones(2), torch.tensor([0, 5]), (4, 3))}), 1.0, "client 'ann'")
    with pytest.raises(AdapterMismatch, match=r"client 'bob', q/positions: .*masks must be shared"):
        average.add(
            Adapter(sparse={"q": SparseDelta(torch.ones(2), torch.tensor([0, 4]), (4, 3))}), 1.0, "client 'bob'"
        )


def test_adapters_are_values():
    with pytest.raises(FrozenInstanceError):
        pair_of(1).scale = 3.0
    pair = pair_of(2)
    truncate(pair, 1).A.zero_()
    mean([(Adapter({"q": pair}), 1.0)]).pairs["q"].A.zero_()
    assert torch.equal(pair.A, torch.ones(2, 3))
