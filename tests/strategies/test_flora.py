"""FLoRA: the side against a dense mean of products over rounds, and the fresh start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.errors import AdapterMismatch
from sheepfold.strategies.flora import flora
from tests.strategies import cohorts as c

TWO_ROUNDS = (c.cohorts(), st.integers(0, 100))


@given(*TWO_ROUNDS)
def test_what_was_learned_is_the_sum_of_every_rounds_mean_of_products(cohort, seed):
    first = flora().fold(cohort.state, iter(cohort.updates))
    one = c.mean_product(cohort.updates, cohort.rows)
    c.close(c.learned(first), one, cohort.size)
    rows = {client: 5 + i for i, client in enumerate(cohort.state.setting.clients)}
    later = c.Cohort(first, c.updates_of(first, rows, seed))
    second = flora().fold(first, iter(later.updates))
    two = c.mean_product(later.updates, later.rows)
    c.close(c.learned(second), {name: one[name] + two[name] for name in one}, cohort.size + later.size)


@c.few
@given(c.cohorts())
def test_uniform_weights_are_the_papers_plain_mean(cohort):
    folded = flora(weights="uniform").fold(cohort.state, cohort.updates)
    c.close(c.learned(folded), c.mean_product(cohort.updates, cohort.rows**0), cohort.size)


@c.few
@given(c.cohorts())
def test_clients_start_afresh_and_a_late_one_gets_what_was_learned(cohort):
    folded = flora().fold(cohort.state, cohort.updates)
    for client in cohort.state.setting.clients:
        handed = flora().assign(folded, client, 1e-3)
        c.close(c.deltas(handed.side), c.learned(folded))
        for name, pair in handed.adapter.pairs.items():
            assert not pair.B.any()
            assert torch.equal(pair.A, folded.adapter.pairs[name].A[: pair.rank])
            assert not torch.equal(pair.A, cohort.state.adapter.pairs[name].A[: pair.rank])


def test_the_fresh_draw_belongs_to_the_seed_and_the_round():
    ranks = {"ann": {"q": 2, "v": 3}}

    def drawn(seed: int, rounds: int) -> torch.Tensor:
        state = c.a_state(ranks, seed=seed)
        for _ in range(rounds):
            state = flora().fold(state, c.updates_of(state, {"ann": 3}, seed=9))
        return state.adapter.pairs["v"].A

    assert torch.equal(drawn(0, 1), drawn(0, 1))
    assert not torch.equal(drawn(0, 1), drawn(1, 1))
    assert not torch.equal(drawn(0, 1), drawn(0, 2))


@c.few
@given(c.cohorts())
def test_the_side_never_outgrows_the_dense_update(cohort):
    state = cohort.state
    for _ in range(3):
        state = flora().fold(state, cohort.updates)
    for name, pair in state.side.pairs.items():
        assert pair.rank <= min(c.SHAPES[name])
        assert pair.scale == 1.0
    assert not state.side.extra


@c.few
@given(c.cohorts())
def test_the_order_of_arrival_leaves_the_fold_alone(cohort):
    c.arrival_leaves_it_alone(flora(), cohort)


@c.few
@given(c.cohorts())
def test_the_scale_of_the_weights_leaves_the_fold_alone(cohort):
    c.scale_of_weights_leaves_it_alone(flora(), cohort)


@c.few
@given(c.cohorts())
def test_equal_clients_return_themselves(cohort):
    c.equal_clients_return_themselves(flora(), cohort)


@c.few
@given(c.cohorts())
def test_heads_are_averaged(cohort):
    c.whole_tensors_are_averaged(flora(), cohort, cohort.rows)


@c.few
@given(c.cohorts())
def test_every_client_is_handed_its_own_ranks(cohort):
    c.handed_out_as_declared(flora(), cohort)


def test_a_state_with_a_side_survives_the_disk(tmp_path):
    ranks = {"ann": {"q": 2, "v": 1}, "bob": {"q": 1, "v": 3}}
    state = c.a_state(ranks, alpha=3.0)
    c.survives_the_disk(flora(), c.Cohort(state, c.updates_of(state, {"ann": 3, "bob": 8}, seed=2)), tmp_path / "s")


def test_a_client_with_other_modules_is_refused():
    state = c.a_state({"ann": {"q": 2, "v": 1}})
    adapter = c.an_adapter(1, {"q": 2, "v": 1})
    lacking = c.an_update("ann", type(adapter)({"q": adapter.pairs["q"]}, adapter.extra))
    with pytest.raises(AdapterMismatch, match="round 1, client 'ann': v is in one adapter only"):
        flora().fold(state, [lacking])
