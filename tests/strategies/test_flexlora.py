"""FlexLoRA: every client is handed the best pair of its rank of the mean of products, by numpy's SVD."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.errors import ConfigError
from sheepfold.strategies.flexlora import flexlora
from tests.strategies import cohorts as c

either = st.sampled_from(["float32", "float64"])


@given(c.cohorts(), either)
def test_no_pair_of_a_clients_rank_is_nearer_to_the_mean_of_products(cohort, precision):
    method = flexlora(precision)
    folded = method.fold(cohort.state, iter(cohort.updates))
    for name, mean in c.mean_product(cohort.updates, cohort.rows).items():
        S = np.linalg.svd(mean, compute_uv=False)
        for client, ranks in cohort.state.setting.ranks.items():
            handed = c.deltas(method.assign(folded, client, 1e-3).adapter)[name]
            least = np.sqrt(np.square(S[ranks[name] :]).sum())
            assert np.linalg.norm(handed - mean) <= least + 1e-5 * cohort.size * np.sqrt(mean.size)


@c.few
@given(c.cohorts(), either)
def test_what_a_client_is_handed_is_numpys_truncated_svd(cohort, precision):
    method = flexlora(precision)
    folded = method.fold(cohort.state, iter(cohort.updates))
    for name, mean in c.mean_product(cohort.updates, cohort.rows).items():
        S = np.append(np.linalg.svd(mean, compute_uv=False), 0.0)
        for client, ranks in cohort.state.setting.ranks.items():
            if S[ranks[name] - 1] - S[ranks[name]] > 0.05 * S[0]:  # else the best is not unique, or hardly
                handed = c.deltas(method.assign(folded, client, 1e-3).adapter)[name]
                np.testing.assert_allclose(handed, c.best(mean, ranks[name]), rtol=0, atol=2e-4 * cohort.size)


@c.few
@given(c.cohorts())
def test_the_global_pair_has_orthonormal_rows_and_falling_singular_values(cohort):
    folded = flexlora("float64").fold(cohort.state, cohort.updates)
    for name, mean in c.mean_product(cohort.updates, cohort.rows).items():
        pair = folded.adapter.pairs[name]
        assert pair.scale == cohort.state.setting.alpha / pair.rank
        found = np.linalg.norm(pair.scale * pair.B.double().numpy(), axis=0)
        S = np.linalg.svd(mean, compute_uv=False)[: pair.rank]
        np.testing.assert_allclose(found, S, rtol=0, atol=1e-5 * cohort.size)
        alive = np.greater(S, 1e-3 * cohort.size)
        A = pair.A.double().numpy()[alive]
        np.testing.assert_allclose(A @ A.T, np.eye(len(A)), rtol=0, atol=1e-5)


@c.few
@given(c.cohorts(), either)
def test_one_client_comes_back_exactly(cohort, precision):
    alone = c.Cohort(cohort.state, cohort.updates[:1])
    method = flexlora(precision)
    folded = method.fold(alone.state, alone.updates)
    c.close(c.learned(folded), c.deltas(alone.updates[0].adapter), alone.size)
    handed = method.assign(folded, alone.updates[0].client, 1e-3).adapter
    c.close(c.deltas(handed), c.deltas(alone.updates[0].adapter), alone.size)


@c.few
@given(st.integers(1, 3), st.lists(st.integers(1, 100), min_size=2, max_size=5), st.integers(0, 100))
def test_a_mean_of_low_rank_comes_back_exactly_to_every_large_enough_client(low, rows, seed):
    """The clients' products share their row space, so their mean has rank `low` although their ranks sum to more."""
    ranks = {client: dict.fromkeys(c.SHAPES, low + i % 2) for i, client in enumerate(c.CLIENTS[: len(rows)])}
    state = c.a_state(ranks, alpha=3.0, seed=seed)
    shared = c.an_adapter(seed, dict.fromkeys(c.SHAPES, low))
    draw = torch.Generator().manual_seed(seed)
    updates = []
    for client, count in zip(ranks, rows, strict=True):
        pairs = {}
        for name, (_, d_out) in c.SHAPES.items():
            rank = ranks[client][name]
            mix = torch.randn(rank, low, generator=draw)
            A, B = mix @ shared.pairs[name].A, torch.randn(d_out, rank, generator=draw)
            pairs[name] = LoraPair(A, B, 3.0 / rank)
        updates.append(c.an_update(client, Adapter(pairs, shared.extra), count))
    cohort = c.Cohort(state, updates)
    folded = flexlora().fold(state, updates)
    for client in ranks:
        handed = flexlora().assign(folded, client, 1e-3).adapter
        c.close(c.deltas(handed), c.mean_product(updates, cohort.rows), 3 * cohort.size)


@c.few
@given(st.integers(0, 1000), st.integers(1, 5))
def test_equal_rank_1_clients_that_share_a_factor_are_averaged_as_fedavg_averages_them(seed, count):
    ranks = dict.fromkeys(c.CLIENTS[:count], dict.fromkeys(c.SHAPES, 1))
    state = c.a_state(ranks, alpha=3.0)
    shared = c.an_adapter(seed, dict.fromkeys(c.SHAPES, 1), 3.0)
    updates = []
    for update in c.updates_of(state, dict.fromkeys(ranks, 4), seed + 1):
        pairs = {n: LoraPair(shared.pairs[n].A, p.B, p.scale) for n, p in update.adapter.pairs.items()}
        updates.append(c.an_update(update.client, Adapter(pairs, shared.extra), 4))
    folded = c.learned(flexlora().fold(state, updates))
    for name, pair in shared.pairs.items():
        mean_B = np.mean([u.adapter.pairs[name].B.double().numpy() for u in updates], axis=0)
        np.testing.assert_allclose(folded[name], 3.0 * mean_B @ pair.A.double().numpy(), rtol=0, atol=1e-4)


@c.few
@given(c.cohorts())
def test_before_round_1_a_small_client_gets_the_first_rows_of_the_fresh_draw(cohort):
    for client in cohort.state.setting.clients:
        for name, pair in flexlora().assign(cohort.state, client, 1e-3).adapter.pairs.items():
            assert torch.equal(pair.A, cohort.state.adapter.pairs[name].A[: pair.rank])
            assert not pair.B.any()


def test_a_large_client_can_train_its_whole_rank_after_a_round_of_small_ones():
    c.every_rank_can_train(flexlora())


def test_a_round_in_which_nobody_learned_leaves_everything_to_be_learned():
    state = c.a_state({"ann": {"q": 3, "v": 3}})
    untrained = c.an_update("ann", state.adapter)
    pairs = flexlora().assign(flexlora().fold(state, [untrained]), "ann", 1e-3).adapter.pairs
    assert not any(pair.B.any() for pair in pairs.values())
    assert all(np.linalg.matrix_rank(pair.A.numpy()) == 3 for pair in pairs.values())


@c.few
@given(c.cohorts())
def test_double_precision_is_no_worse_than_single(cohort):
    mean = c.mean_product(cohort.updates, cohort.rows)
    assume(all(np.linalg.norm(m) > 0.1 for m in mean.values()))
    single, double = (c.learned(flexlora(p).fold(cohort.state, cohort.updates)) for p in ("float32", "float64"))
    for name, matrix in mean.items():
        assert np.linalg.norm(double[name] - matrix) <= np.linalg.norm(single[name] - matrix) + 1e-6 * cohort.size


@c.few
@given(c.cohorts())
def test_the_same_updates_in_client_order_give_the_same_bits(cohort):
    c.same(*(flexlora().fold(cohort.state, iter(cohort.updates)) for _ in range(2)))


@c.few
@given(c.cohorts())
def test_order_of_arrival_and_scale_of_weights_leave_the_fold_as_near_as_can_be(cohort):
    more = [c.an_update(u.client, u.adapter, 7 * u.measurements.rows) for u in reversed(cohort.updates)]
    folded = c.learned(flexlora().fold(cohort.state, more))
    for name, mean in c.mean_product(cohort.updates, cohort.rows).items():
        least = np.linalg.norm(mean - c.best(mean, cohort.state.setting.widest[name]))
        assert np.linalg.norm(folded[name] - mean) <= least + 1e-5 * cohort.size * np.sqrt(mean.size)


@c.few
@given(c.cohorts())
def test_equal_clients_return_themselves(cohort):
    c.equal_clients_return_themselves(flexlora(), cohort)


def test_what_is_handed_out_is_in_single_precision_whatever_was_computed():
    state = c.a_state({"ann": {"q": 2, "v": 1}})
    folded = flexlora("float64").fold(state, c.updates_of(state, {"ann": 3}, seed=2))
    assert {tensor.dtype for tensor in folded.adapter.tensors().values()} == {torch.float32}


@c.few
@given(c.cohorts())
def test_heads_are_averaged(cohort):
    c.whole_tensors_are_averaged(flexlora(), cohort, cohort.rows)


@c.few
@given(c.cohorts())
def test_every_client_is_handed_its_own_ranks(cohort):
    c.handed_out_as_declared(flexlora(), cohort)


def test_a_state_survives_the_disk(tmp_path):
    state = c.a_state({"ann": {"q": 2, "v": 1}, "bob": {"q": 1, "v": 3}}, alpha=3.0)
    cohort = c.Cohort(state, c.updates_of(state, {"ann": 3, "bob": 8}, seed=2))
    c.survives_the_disk(flexlora(), cohort, tmp_path / "s")


def test_another_precision_is_refused():
    with pytest.raises(ConfigError, match="precision: no 'float16'; did you mean 'float"):
        flexlora("float16")
