"""Weighted means of products and their best pairs, against the singular values of dense float64 sums in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold import products
from sheepfold.adapter import LoraPair, truncate
from sheepfold.errors import AdapterMismatch
from sheepfold.products import ProductSum, best_rank

many = settings(max_examples=60, deadline=None)

SCALES = st.sampled_from([0.25, 1.0, 2.0, 16 / 3])
WEIGHTS = st.floats(0.01, 1000)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}  # of a sum of products, relative to its terms


@st.composite
def cohorts(draw, min_clients=1, max_clients=6, max_rank=6, sides=st.integers(1, 12)):
    """[(pair, weight)] of one shape, with each client's own rank and scale: kept as factors, or dense, as it comes."""
    d_out, d_in = draw(sides), draw(sides)
    numbers = torch.Generator().manual_seed(draw(SEEDS))
    return [
        (random_pair(d_out, d_in, draw(st.integers(1, max_rank)), numbers, draw(SCALES)), draw(WEIGHTS))
        for _ in range(draw(st.integers(min_clients, max_clients)))
    ]


def random_pair(d_out, d_in, rank, numbers, scale=1.0, decay=1.0):
    """A float32 pair, whose singular values fall by about `decay` from one to the next."""
    A = torch.randn(rank, d_in, generator=numbers)
    return LoraPair(A, torch.randn(d_out, rank, generator=numbers) * decay ** torch.arange(rank), scale)


def total(cohort, dtype=torch.float32):
    found = ProductSum(dtype)
    for pair, weight in cohort:
        found.add(pair, weight)
    return found


def dense(pair):
    return pair.scale * pair.B.double().numpy() @ pair.A.double().numpy()


def mean(cohort):
    return sum(w * dense(p) for p, w in cohort) / sum(w for _, w in cohort)


def size(cohort):
    """What rounding is relative to: the largest a sum of such products could be."""
    return sum(w * np.linalg.norm(dense(p)) for p, w in cohort) / sum(w for _, w in cohort)


def assert_best(pair, matrix, rank, rounding):
    """The pair and its beginnings have errors within 1e-6 of the least possible, up to an absolute rounding."""
    assert pair.rank == rank
    values = np.linalg.svd(matrix, compute_uv=False)
    for shorter in {rank, *range(1, rank, 1 + rank // 8)}:
        error = np.linalg.norm(dense(truncate(pair, shorter)) - matrix)
        assert error <= np.hypot(np.linalg.norm(values[shorter:]), rounding) * (1 + 1e-6)


@many
@given(cohorts(), DTYPES)
def test_the_sum_is_the_weighted_mean_for_any_ranks_weights_and_scales(cohort, dtype):
    found, expected = total(cohort, dtype), mean(cohort)
    tolerance = ROUNDING[dtype] * size(cohort)
    np.testing.assert_allclose(found.delta().numpy(), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(dense(found.exact()), expected, rtol=0, atol=tolerance)
    assert found.exact().rank <= min(expected.shape)
    assert (found.exact().scale, found.exact().A.dtype, found.exact().B.dtype) == (1.0, dtype, dtype)


@many
@given(cohorts(), DTYPES, SCALES, st.data())
def test_the_best_pair_is_as_near_as_any_of_its_rank_and_so_is_its_beginning(cohort, dtype, scale, data):
    expected = mean(cohort)
    rank = data.draw(st.integers(1, min(expected.shape)))
    found = total(cohort, dtype).best_rank(rank, scale)
    assert (found.scale, found.A.dtype, found.B.dtype) == (scale, dtype, dtype)
    assert_best(found, expected, rank, ROUNDING[dtype] * size(cohort))


@many
@given(cohorts(), DTYPES)
def test_rows_of_a_are_orthonormal_and_columns_of_b_orthogonal_and_descending(cohort, dtype):
    shape = mean(cohort).shape
    found = total(cohort, dtype).best_rank(min(shape), 0.5)
    rows, columns = (found.A @ found.A.T).double(), (found.B.T @ found.B).double()
    lengths, kept = columns.diag().sqrt(), found.A.any(1)
    rounding = ROUNDING[dtype]
    feels = rounding * (1 + lengths[0] / lengths[kept])  # vectors of a small singular value feel its condition
    assert ((rows - torch.eye(len(rows)))[kept][:, kept].abs() <= torch.maximum(feels, feels[:, None])).all()
    assert (columns - columns.diag().diag()).abs().max() <= rounding * columns.max()
    assert (lengths[1:] <= lengths[:-1] + rounding * lengths[0]).all()
    assert (lengths[~kept] == 0).all()


@many
@given(cohorts(sides=st.integers(7, 12), max_clients=1))
def test_one_client_returns_its_own_product_whatever_its_weight(cohort):
    pair = cohort[0][0]
    tolerance = 1e-6 * np.linalg.norm(dense(pair))
    np.testing.assert_allclose(total(cohort).delta().numpy(), dense(pair), rtol=0, atol=tolerance)
    np.testing.assert_allclose(dense(total(cohort).best_rank(pair.rank)), dense(pair), rtol=0, atol=tolerance)
    np.testing.assert_allclose(dense(best_rank(pair, pair.rank, 4.0)), dense(pair), rtol=0, atol=tolerance)


@many
@given(cohorts(sides=st.integers(7, 12), max_clients=1), st.lists(WEIGHTS, min_size=2, max_size=5), SCALES)
def test_equal_clients_return_themselves_in_zeros_beyond_their_rank(cohort, weights, scale):
    pair = cohort[0][0]
    d_out, d_in = dense(pair).shape
    found = total([(pair, weight) for weight in weights], torch.float64).best_rank(min(d_out, d_in), scale)
    np.testing.assert_allclose(dense(found), dense(pair), rtol=0, atol=1e-12 * np.linalg.norm(dense(pair)))
    assert not found.A[pair.rank :].any()
    assert not found.B[:, pair.rank :].any()


@many
@given(cohorts(), st.floats(1e-3, 1e3), st.randoms())
def test_order_and_scale_of_weights_leave_the_mean_and_the_error_alone(cohort, factor, random):
    moved = [(pair, weight * factor) for pair, weight in cohort]
    random.shuffle(moved)
    tolerance = ROUNDING[torch.float32] * size(cohort)
    torch.testing.assert_close(total(moved).delta(), total(cohort).delta(), rtol=0, atol=tolerance)
    assert_best(total(moved).best_rank(1), mean(cohort), 1, tolerance)


@many
@given(cohorts(), DTYPES)
def test_the_same_pairs_in_the_same_order_give_the_same_bits(cohort, dtype):
    one, two = total(cohort, dtype), total(cohort, dtype)
    for left, right in ((one.best_rank(1), two.best_rank(1)), (one.exact(), two.exact())):
        assert torch.equal(left.A, right.A)
        assert torch.equal(left.B, right.B)
    assert (one.best_rank(1).A.gather(1, one.best_rank(1).A.abs().argmax(1, keepdim=True)) >= 0).all()


@many
@given(cohorts(), SCALES, st.data())
def test_the_best_pair_of_one_pair_is_that_of_its_sum(cohort, scale, data):
    pair = cohort[0][0]
    rank = data.draw(st.integers(1, min(dense(pair).shape)))
    assert_best(best_rank(pair, rank, scale), dense(pair), rank, 1e-6 * np.linalg.norm(dense(pair)))
    wide = LoraPair(pair.A.double(), pair.B.double(), pair.scale)
    assert_best(best_rank(wide, rank, scale), dense(pair), rank, 1e-13 * np.linalg.norm(dense(pair)))
    assert best_rank(wide, rank, scale).A.dtype == torch.float64
    half = LoraPair(pair.A.bfloat16(), pair.B.bfloat16(), pair.scale)
    assert best_rank(half, rank, scale).B.dtype == torch.bfloat16


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 9), (9, 12)])
def test_factors_are_kept_up_to_the_smaller_side_and_a_dense_matrix_beyond(d_out, d_in):
    numbers = torch.Generator().manual_seed(1)
    cohort = [(random_pair(d_out, d_in, 3, numbers), 1.0) for _ in range(40)]
    assert total(cohort[:2]).exact().rank == 6
    assert total(cohort[:3]).exact().rank == 9
    whole = total(cohort).exact()  # 120 > 9
    assert whole.A.numel() + whole.B.numel() == 12 * 9 + 9 * 9
    eye = whole.A if d_in == 9 else whole.B
    assert torch.equal(eye, torch.eye(9))
    np.testing.assert_allclose(dense(whole), mean(cohort), rtol=0, atol=1e-6 * size(cohort))


def test_pairs_added_after_a_look_count_too():
    numbers = torch.Generator().manual_seed(2)
    cohort = [(random_pair(12, 9, 4, numbers), 1.0 + k) for k in range(6)]
    found = ProductSum()
    for seen, (pair, weight) in enumerate(cohort, 1):
        found.add(pair, weight)
        np.testing.assert_allclose(found.delta().numpy(), mean(cohort[:seen]), rtol=0, atol=1e-6 * size(cohort))
        assert_best(found.best_rank(2), mean(cohort[:seen]), 2, 1e-6 * size(cohort))


def test_what_was_added_is_a_copy():
    pair = LoraPair(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    found = total([(pair, 1.0)])
    pair.A.zero_()
    found.exact().B.zero_()
    assert torch.equal(found.delta(), torch.ones(2, 3, dtype=torch.float64))


def test_a_core_belongs_to_the_product():
    numbers = torch.Generator().manual_seed(3)
    pair = random_pair(6, 5, 2, numbers, 0.5)
    cored = LoraPair(pair.A, pair.B, pair.scale, core=torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    torch.testing.assert_close(total([(cored, 2.0)]).delta(), cored.delta(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clients", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_of_zeros_is_zeros_of_every_rank(clients, dtype):
    pair = LoraPair(torch.ones(2, 9), torch.zeros(12, 2), 1.0)
    found = total([(pair, 1.0)] * clients, dtype)
    for rank in (1, 9):
        best = found.best_rank(rank, 2.0)
        assert (best.A.shape, best.B.shape) == ((rank, 9), (12, rank))
        assert not best.A.any()
        assert not best.B.any()


@given(st.sampled_from([(12, 9), (9, 12)]), st.integers(1, 4), SEEDS)
def test_a_sum_that_cancels_down_to_few_directions_keeps_those_alone(shape, rank, seed):
    numbers = torch.Generator().manual_seed(seed)
    kept, gone = (random_pair(*shape, r, numbers) for r in (rank, 5))
    cohort = [(gone, 1.0), (kept, 1.0), (LoraPair(gone.A, -gone.B, gone.scale), 1.0)]
    for dtype in (torch.float32, torch.float64):
        found = total(cohort, dtype).best_rank(rank)
        assert np.linalg.norm(3 * dense(found) - dense(kept)) < ROUNDING[dtype] * 3 * size(cohort)


def spectrum(d_out, d_in, values, seed=0):
    """A dense matrix with these singular values, as a sum of more pairs than its sides take as factors."""
    numbers = torch.Generator().manual_seed(seed)
    n = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, n, generator=numbers, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, n, generator=numbers, dtype=torch.float64)).Q
    left = (U * values).float()
    halves = [LoraPair(V.T.float(), left, 0.5), LoraPair(V.T.float(), left, 1.5)]
    return [(pair, 1.0) for pair in halves]


def random_cohort(d_out, d_in, decay):
    numbers = torch.Generator().manual_seed(7)
    return [(random_pair(d_out, d_in, (8, 30, 60)[k % 3], numbers, 2.0, decay), 1.0 + k) for k in range(12)]


SEARCHED = {
    "flat": lambda shape: random_cohort(*shape, 1.0),
    "decaying": lambda shape: random_cohort(*shape, 0.9),
    "steep": lambda shape: spectrum(*shape, 0.93 ** torch.arange(192.0)),
    "very steep": lambda shape: spectrum(*shape, 0.6 ** torch.arange(192.0)),
    "of low rank": lambda shape: spectrum(*shape, (torch.arange(192) < 12) * 1.0),
    "of a rank that guards cover": lambda shape: spectrum(*shape, (torch.arange(192) < 30) * 1.0),
    "nearly a cluster": lambda shape: spectrum(*shape, 1 + 0.5 * (torch.arange(192) < 20)),
}
CLUSTERS = {
    "all equal": lambda shape: spectrum(*shape, torch.ones(192)),
    "equal around the rank": lambda shape: spectrum(*shape, 1.0 + (torch.arange(192) < 100)),
}


@pytest.fixture
def searched(monkeypatch):
    """Search in small matrices too; returns what came of it, True for found."""
    monkeypatch.setattr(products, "SMALL", 0)
    outcomes, search = [], products.search

    def spy(*arguments):
        found = search(*arguments)
        outcomes.append(found is not None)
        return found

    monkeypatch.setattr(products, "search", spy)
    return outcomes


@pytest.mark.parametrize("shape", [(256, 192), (192, 256)])
@pytest.mark.parametrize("kind", SEARCHED)
def test_a_search_finds_pairs_as_good_as_the_best_and_the_same_bits_again(shape, kind, searched):
    cohort = SEARCHED[kind](shape)
    found = total(cohort).best_rank(20, 0.5)
    assert searched[-1]
    matrix = mean(cohort)
    assert_best(found, matrix, 20, 1e-6 * np.linalg.norm(matrix))
    again = total(cohort).best_rank(20, 0.5)
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)


@pytest.mark.parametrize("kind", CLUSTERS)
def test_where_nothing_is_proven_the_exact_decomposition_answers(kind, searched):
    cohort = CLUSTERS[kind]((256, 192))
    found = total(cohort).best_rank(20)
    assert searched == [False, False]  # in float32, in float64
    matrix = mean(cohort)
    assert_best(found, matrix, 20, 1e-6 * np.linalg.norm(matrix))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.8, 1.0), st.integers(1, 12), st.sampled_from([torch.float32, torch.float64]))
def test_what_a_search_misses_is_within_what_it_promises(seed, decay, rank, dtype):
    numbers = torch.Generator().manual_seed(seed)
    N = torch.randn(150, 110, generator=numbers) * decay ** torch.arange(110)
    found = products.search(N, products._gram(N, dtype), rank, 0.0)
    if found is None:
        return
    values = np.linalg.svd(N.double().numpy(), compute_uv=False) ** 2
    held = float((N.double() @ found).square().sum())
    assert values[:rank].sum() - held <= products.EXCESS * values[rank:].sum() + 1e-14 * values.sum()
    torch.testing.assert_close(found.T @ found, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_bound_is_void_where_the_complement_holds_more():
    values = torch.tensor([5.0, 4, 3, 2, 1, 0.5], dtype=torch.float64)
    G, V = torch.diag(values), torch.eye(6, dtype=torch.float64)
    assert products._is_below(G, values[:3], V[:, :3], 2.1)
    assert not products._is_below(G, values[:3], V[:, :3], 1.9)
    assert not products._is_below(G, values[[0, 1, 3]], V[:, [0, 1, 3]], 2.9)  # 3 was overlooked


@pytest.mark.parametrize("clients", [1, 20])
def test_a_rank_beyond_the_smaller_side_is_refused_with_the_numbers(clients):
    pair = LoraPair(torch.ones(2, 9), torch.ones(12, 2), 1.0)
    for rank in (0, 10):
        with pytest.raises(AdapterMismatch, match=rf"rank {rank} of a \(12, 9\) matrix: choose from 1 to 9"):
            total([(pair, 1.0)] * clients).best_rank(rank)
        with pytest.raises(AdapterMismatch, match=rf"rank {rank} of a \(12, 9\) matrix"):
            best_rank(pair, rank)


def test_a_pair_of_other_sides_is_refused_and_leaves_no_trace():
    pair = LoraPair(torch.ones(2, 9), torch.ones(12, 2), 1.0)
    found = total([(pair, 1.0)])
    with pytest.raises(AdapterMismatch, match=r"ward-7: B @ A is \(12, 3\) @ \(3, 8\), expected \(12, r\) @ \(r, 9\)"):
        found.add(LoraPair(torch.ones(3, 8), torch.ones(12, 3), 1.0), 1.0, "ward-7")
    with pytest.raises(AdapterMismatch, match=r"B @ A is \(12, 3\) @ \(2, 9\)"):
        found.add(LoraPair(torch.ones(2, 9), torch.ones(12, 3), 1.0), 1.0)
    assert torch.equal(found.delta(), pair.delta())


def test_nothing_has_no_mean():
    pair = LoraPair(torch.ones(2, 9), torch.ones(12, 2), 1.0)
    for empty in (ProductSum(), total([(pair, 0.0)])):
        for ask in (empty.exact, empty.delta, lambda empty=empty: empty.best_rank(1)):
            with pytest.raises(AdapterMismatch, match="no products to average: the weights sum to 0"):
                ask()
