"""HetLoRA: the fold against numpy, the penalty against one client by hand, and pruning that is remembered."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.errors import ConfigError
from sheepfold.local.rules import Factors, Trained
from sheepfold.messages import Assignment
from sheepfold.state import ServerState, load, save
from sheepfold.strategies.hetlora import RANKS, hetlora, pruned, self_pruning
from tests.strategies import cohorts as c

uniform_or_rows = st.sampled_from(["uniform", "rows"])


def padded_mean(cohort: c.Cohort, name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of the zero-padded mean with weights p_k ||s_k B_k A_k||_F, or p_k where all products are zero."""
    d_in, d_out = c.SHAPES[name]
    widest, alpha = cohort.state.setting.widest[name], cohort.state.setting.alpha
    pairs = [update.adapter.pairs[name] for update in cohort.updates]
    norms = np.array([np.sqrt(np.square(c.dense(pair)).sum()) for pair in pairs])
    weights = data * norms if norms.any() else data
    A, B = np.zeros((widest, d_in)), np.zeros((d_out, widest))
    for share, pair in zip(weights / weights.sum(), pairs, strict=True):
        root = np.sqrt(alpha / pair.rank)
        A[: pair.rank] += share * root * pair.A.double().numpy()
        B[:, : pair.rank] += share * root * pair.B.double().numpy()
    return A, B


def check(cohort: c.Cohort, weights: str) -> None:
    folded = hetlora(weights=weights).fold(cohort.state, iter(cohort.updates))
    data = cohort.rows if weights == "rows" else cohort.rows**0
    for name, pair in folded.adapter.pairs.items():
        A, B = padded_mean(cohort, name, data)
        trained = A.any(axis=1)
        np.testing.assert_allclose(pair.B.numpy(), B, rtol=0, atol=1e-5 * cohort.size)
        np.testing.assert_allclose(pair.A.numpy()[trained], A[trained], rtol=0, atol=1e-5 * cohort.size)
        assert pair.scale == 1.0
        for client, ranks in cohort.state.setting.ranks.items():
            handed = hetlora(weights=weights).assign(folded, client, 1e-3).adapter.pairs[name]
            r = ranks[name]
            assert handed.scale == cohort.state.setting.alpha / r
            np.testing.assert_allclose(c.dense(handed), B[:, :r] @ A[:r], rtol=0, atol=1e-4 * cohort.size)


@given(c.cohorts(), uniform_or_rows)
def test_the_fold_weighs_padded_factors_by_the_size_of_each_update(cohort, weights):
    check(cohort, weights)


@c.few
@given(c.cohorts(), uniform_or_rows, st.data())
def test_updates_of_size_zero_count_only_where_there_is_no_other(cohort, weights, data):
    updates = []
    for update in cohort.updates:
        idle = data.draw(st.sets(st.sampled_from(sorted(c.SHAPES))))
        pairs = {n: replace(p, B=p.B * (n not in idle)) for n, p in update.adapter.pairs.items()}
        updates.append(replace(update, adapter=replace(update.adapter, pairs=pairs)))
    check(c.Cohort(cohort.state, updates), weights)


def factors_of(adapters: list[Adapter]) -> Factors:
    """Return clients' factors as an engine lays them out: a leading client axis, smaller ranks padded with zeros."""
    now, ranks = {}, {}
    for name, (d_in, d_out) in c.SHAPES.items():
        ranks[name] = torch.tensor([a.pairs[name].rank for a in adapters])
        widest = int(ranks[name].max())
        A, B = torch.zeros(len(adapters), widest, d_in), torch.zeros(len(adapters), d_out, widest)
        for k, adapter in enumerate(adapters):
            rank = adapter.pairs[name].rank
            A[k, :rank], B[k, :, :rank] = adapter.pairs[name].A, adapter.pairs[name].B
        now |= {f"{name}/A": A.requires_grad_(), f"{name}/B": B.requires_grad_()}
    return Factors(now, now, ranks)


def by_hand(adapter: Adapter, gamma: float, regularisation: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the penalty of one client and its gradient, straight from the paper's formula."""
    leaves = {n: t.clone().requires_grad_() for n, t in adapter.tensors().items() if not n.endswith("extra")}
    penalty = torch.zeros(())
    for name in c.SHAPES:
        A, B = leaves[f"{name}/A"], leaves[f"{name}/B"]
        rank = len(A)
        cut = int(np.floor(gamma * rank))
        if rank > 1:
            cut = min(max(cut, 1), rank - 1)
            penalty = penalty + (A[cut:] ** 2).sum().sqrt() * (B[:, cut:] ** 2).sum().sqrt()
    penalty = regularisation * penalty
    if penalty.requires_grad:
        penalty.backward()
    return penalty.detach(), {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


adapters = st.lists(st.fixed_dictionaries(dict.fromkeys(c.SHAPES, st.integers(1, 5))), min_size=1, max_size=4).map(
    lambda cohort: [c.an_adapter(seed, ranks) for seed, ranks in enumerate(cohort)]
)
gammas = st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.99])


@given(adapters, gammas)
def test_the_penalty_and_its_gradient_are_each_clients_own_as_worked_out_by_hand(clients, gamma):
    rule = self_pruning(gamma, 0.1)
    factors = factors_of(clients)
    penalty = rule.penalty(factors)
    penalty.sum().backward()
    for k, adapter in enumerate(clients):
        expected, gradient = by_hand(adapter, gamma, 0.1)
        torch.testing.assert_close(penalty[k].detach(), expected)
        for name in c.SHAPES:
            rank = adapter.pairs[name].rank
            of_A, of_B = factors.now[f"{name}/A"].grad[k], factors.now[f"{name}/B"].grad[k]
            torch.testing.assert_close(of_A[:rank], gradient[f"{name}/A"])
            torch.testing.assert_close(of_B[:, :rank], gradient[f"{name}/B"])
            assert not of_A[rank:].any()
            assert not of_B[:, rank:].any()
            assert rank == 1 or (of_A[:rank].any() and of_B[:, :rank].any())


@c.few
@given(adapters, gammas)
def test_clients_of_different_ranks_at_once_equal_one_at_a_time(clients, gamma):
    rule = self_pruning(gamma, 0.1)
    together = rule.penalty(factors_of(clients)).detach()
    alone = torch.cat([rule.penalty(factors_of([adapter])).detach() for adapter in clients])
    torch.testing.assert_close(together, alone)


def test_a_tail_of_zeros_has_a_penalty_and_a_gradient_of_zero():
    fresh = {n: replace(p, B=torch.zeros_like(p.B)) for n, p in c.an_adapter(1, {"q": 3, "v": 3}).pairs.items()}
    factors = factors_of([Adapter(fresh)])
    penalty = self_pruning(0.5, 0.1).penalty(factors)
    penalty.sum().backward()
    assert penalty.tolist() == [0.0]
    assert all(not tensor.grad.any() for tensor in factors.now.values())


def test_pruning_goes_to_gamma_of_the_rank_and_never_below_one():
    ranks = torch.tensor([1, 2, 3, 8, 100, 200])
    assert pruned(ranks, 0.99).tolist() == [1, 1, 2, 7, 99, 198]
    assert pruned(ranks, 0.5).tolist() == [1, 1, 1, 4, 50, 100]
    assert pruned(ranks, 0.001).tolist() == [1, 1, 1, 1, 1, 1]


def with_tail(pair: LoraPair, times: float) -> LoraPair:
    """Return the pair with its last row of A multiplied."""
    A = pair.A.clone()
    A[-1] *= times
    return replace(pair, A=A)


def trained_from(assignment: Assignment, times: dict[str, float]) -> Adapter:
    """Return what a client that changed its tails by these factors sends, under the rule of gamma 0.99."""
    pairs = {name: with_tail(pair, times[name]) for name, pair in assignment.adapter.pairs.items()}
    trained = Trained(replace(assignment.adapter, pairs=pairs), own={})
    return hetlora().local.finish(assignment, trained).adapter


def a_round_later() -> ServerState:
    ranks = {"ann": {"q": 4, "v": 1}, "bob": {"q": 3, "v": 3}, "cleo": {"q": 2, "v": 4}}
    state = hetlora().begin(c.a_state(ranks, alpha=3.0))
    return hetlora().fold(state, c.updates_of(state, {"ann": 1, "bob": 2, "cleo": 3}, seed=4))


def test_a_tail_that_shrank_is_cut_off_and_the_rest_keeps_its_product():
    given = hetlora().assign(a_round_later(), "bob", 1e-3)
    sent = trained_from(given, {"q": 0.5, "v": 1.5})
    assert sent.ranks == {"q": 2, "v": 3}
    assert sent.pairs["q"].scale == 3.0 / 2
    before = given.adapter.pairs["q"]
    leading = replace(before, A=before.A[:2], B=before.B[:, :2])
    np.testing.assert_allclose(c.dense(sent.pairs["q"]), c.dense(leading), rtol=1e-5, atol=1e-6)
    assert sent.extra.keys() == {"head"}


def test_an_unchanged_tail_a_fresh_one_and_rank_1_are_left_alone():
    later = a_round_later()
    assert trained_from(hetlora().assign(later, "bob", 1e-3), {"q": 1.0, "v": 1.0}).ranks == {"q": 3, "v": 3}
    assert trained_from(hetlora().assign(later, "ann", 1e-3), {"q": 2.0, "v": 0.1}).ranks == {"q": 4, "v": 1}
    fresh = hetlora().begin(c.a_state({"bob": {"q": 3, "v": 3}}))
    assert trained_from(hetlora().assign(fresh, "bob", 1e-3), {"q": 0.5, "v": 0.5}).ranks == {"q": 3, "v": 3}


def test_pruned_ranks_are_remembered_round_after_round_and_over_a_resume(tmp_path):
    method, state = hetlora(), a_round_later()
    assert RANKS not in state.memory
    for expected in (2, 1, 1):
        given = method.assign(state, "bob", 1e-3)
        state = method.fold(state, [c.an_update("bob", trained_from(given, {"q": 0.5, "v": 1.5}))])
        assert state.memory[RANKS].tolist() == [[4, 1], [expected, 3], [2, 4]]
        assert state.memory[RANKS].dtype == torch.int64
        save(state, tmp_path / "state")
        read = load(tmp_path / "state", state.setting)
        c.same(read, state)
        state = read
    assert method.assign(state, "ann", 1e-3).adapter.ranks == {"q": 4, "v": 1}
    assert method.assign(state, "bob", 1e-3).adapter.ranks == {"q": 1, "v": 3}
    assert state.adapter.ranks == {"q": 4, "v": 4}


def test_a_client_that_stays_away_keeps_its_pruned_rank_while_others_prune():
    method, state = hetlora(), a_round_later()
    for client in ("bob", "cleo"):
        given = method.assign(state, client, 1e-3)
        state = method.fold(state, [c.an_update(client, trained_from(given, {"q": 0.5, "v": 0.5}))])
    # bob alone left zeros in the fourth row of v, so cleo has no tail there to compare with
    assert state.memory[RANKS].tolist() == [[4, 1], [2, 2], [1, 4]]


def test_server_methods_around_it_find_the_fresh_adapter_in_the_folds_own_form():
    begun = hetlora().begin(c.a_state({"ann": {"q": 4, "v": 1}}))
    assert all(pair.scale == 1.0 for pair in begun.adapter.pairs.values())


def test_a_pruned_update_folds_as_its_product():
    state = a_round_later()
    sent = trained_from(hetlora().assign(state, "bob", 1e-3), {"q": 0.5, "v": 0.5})
    folded = hetlora().fold(state, [c.an_update("bob", sent)])
    c.close(c.learned(folded), c.deltas(sent), 10.0)


def test_without_gamma_there_is_no_client_half():
    assert hetlora(gamma=None).local is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.0}, "gamma: found 1.0, expected between 0 and 1, or null: no pruning"),
        ({"gamma": "some"}, "gamma: found 'some'"),
        ({"gamma": 0.0}, "gamma: found 0.0"),
        ({"regularisation": -1.0}, "regularisation: found -1.0, expected at least 0"),
    ],
)
def test_options_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        hetlora(**arguments)


def test_a_large_client_can_train_its_whole_rank_after_a_round_of_small_ones():
    c.every_rank_can_train(hetlora())


@c.few
@given(c.cohorts())
def test_the_order_of_arrival_leaves_the_fold_alone(cohort):
    c.arrival_leaves_it_alone(hetlora(weights="rows"), cohort)


@c.few
@given(c.cohorts())
def test_the_scale_of_the_weights_leaves_the_fold_alone(cohort):
    c.scale_of_weights_leaves_it_alone(hetlora(weights="rows"), cohort)


@c.few
@given(c.cohorts())
def test_equal_clients_return_themselves(cohort):
    c.equal_clients_return_themselves(hetlora(gamma=None), cohort)


@c.few
@given(c.cohorts(), uniform_or_rows)
def test_heads_are_averaged_by_data_alone(cohort, weights):
    data = cohort.rows if weights == "rows" else cohort.rows**0
    c.whole_tensors_are_averaged(hetlora(weights=weights), cohort, data)


@c.few
@given(c.cohorts())
def test_every_client_is_handed_its_own_ranks(cohort):
    c.handed_out_as_declared(hetlora(), cohort)
