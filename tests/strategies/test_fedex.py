"""FedEx-LoRA: means of factors plus residuals are the mean of products, exactly or as near as the rank allows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.errors import AdapterMismatch, ConfigError
from sheepfold.strategies.fedavg import fedavg
from sheepfold.strategies.fedex import fedex
from tests.strategies import cohorts as c

equal_ranks = c.cohorts(mixed=False)


def product_of_means(cohort: c.Cohort) -> c.Dense:
    def mean(name: str, factor: str) -> np.ndarray:
        every = [getattr(u.adapter.pairs[name], factor).double().numpy() for u in cohort.updates]
        return np.average(every, axis=0, weights=cohort.rows)

    scale = {name: cohort.updates[0].adapter.pairs[name].scale for name in c.SHAPES}
    return {name: scale[name] * mean(name, "B") @ mean(name, "A") for name in c.SHAPES}


def residual(cohort: c.Cohort) -> c.Dense:
    exact, missed = c.mean_product(cohort.updates, cohort.rows), product_of_means(cohort)
    return {name: exact[name] - missed[name] for name in exact}


@given(equal_ranks, st.integers(0, 100))
def test_what_was_learned_is_the_mean_of_products_in_every_round(cohort, seed):
    first = fedex().fold(cohort.state, iter(cohort.updates))
    c.close(c.learned(first), c.mean_product(cohort.updates, cohort.rows), cohort.size)
    rows = {client: 5 + i for i, client in enumerate(cohort.state.setting.clients)}
    later = c.Cohort(first, c.updates_of(first, rows, seed))
    second = fedex().fold(first, iter(later.updates))
    one, two = residual(cohort), c.mean_product(later.updates, later.rows)
    c.close(c.learned(second), {name: one[name] + two[name] for name in one}, cohort.size + later.size)


@c.few
@given(equal_ranks)
def test_clients_are_handed_fedavgs_factors_and_the_residual(cohort):
    folded = fedex().fold(cohort.state, cohort.updates)
    assert folded.adapter.hash() == fedavg().fold(cohort.state, cohort.updates).adapter.hash()
    late = fedex().assign(folded, cohort.state.setting.clients[-1], 1e-3)
    assert late.adapter is folded.adapter
    c.close(c.deltas(late.side), residual(cohort), cohort.size)


@c.few
@given(equal_ranks, st.integers(1, 6))
def test_a_residual_rank_keeps_the_best_of_that_rank(cohort, rank):
    folded = fedex(residual_rank=rank).fold(cohort.state, cohort.updates)
    expected = {name: c.best(matrix, rank) for name, matrix in residual(cohort).items()}
    found = c.deltas(folded.side)
    for name, matrix in residual(cohort).items():  # where singular values tie, the best is not unique: compare errors
        error, least = (np.linalg.norm(m[name] - matrix) for m in (found, expected))
        assert error <= least + 1e-4 * cohort.size
        assert folded.side.pairs[name].rank == min(rank, *c.SHAPES[name])


@c.few
@given(equal_ranks)
def test_the_side_never_outgrows_the_dense_update(cohort):
    state = cohort.state
    for _ in range(3):
        state = fedex().fold(state, cohort.updates)
    for name, pair in state.side.pairs.items():
        assert pair.rank <= min(c.SHAPES[name])
        assert pair.scale == 1.0


@c.few
@given(equal_ranks)
def test_the_order_of_arrival_leaves_the_fold_alone(cohort):
    c.arrival_leaves_it_alone(fedex(), cohort)


@c.few
@given(equal_ranks)
def test_the_scale_of_the_weights_leaves_the_fold_alone(cohort):
    c.scale_of_weights_leaves_it_alone(fedex(), cohort)


@c.few
@given(equal_ranks)
def test_equal_clients_return_themselves(cohort):
    c.equal_clients_return_themselves(fedex(), cohort)


@c.few
@given(equal_ranks)
def test_heads_are_averaged(cohort):
    c.whole_tensors_are_averaged(fedex(), cohort, cohort.rows)


@pytest.mark.parametrize("rank", [None, 1])
def test_a_state_with_a_residual_survives_the_disk(tmp_path, rank):
    own = {"q": 2, "v": 1}
    state = c.a_state({"ann": own, "bob": own}, alpha=3.0)
    cohort = c.Cohort(state, c.updates_of(state, {"ann": 3, "bob": 8}, seed=2))
    c.survives_the_disk(fedex(residual_rank=rank), cohort, tmp_path / "s")


def test_unequal_ranks_and_a_residual_of_no_rank_are_refused():
    state = c.a_state({"ann": {"q": 2, "v": 1}, "bob": {"q": 1, "v": 1}})
    with pytest.raises(AdapterMismatch, match="flora and flexlora accept mixed ranks"):
        fedex().fold(state, c.updates_of(state, {"ann": 3, "bob": 8}, seed=2))
    for rank in (0, 1.5, "many"):
        with pytest.raises(ConfigError, match=rf"residual_rank: found {rank!r}, expected 1, 2, ..., or null: exact"):
            fedex(residual_rank=rank)
