"""SLoRA: one mask for all, a mean as sparse as its parts, the best start for LoRA, and a residual kept exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair, kind
from sheepfold.config import build
from sheepfold.errors import ConfigError
from sheepfold.state import ServerState, load, save
from sheepfold.strategies.fedavg import fedavg, fedit
from sheepfold.strategies.fedex import fedex
from sheepfold.strategies.fedopt import fedadam
from sheepfold.strategies.fedprox import fedprox
from sheepfold.strategies.ffa_lora import ffa_lora
from sheepfold.strategies.flexlora import flexlora
from sheepfold.strategies.flora import flora
from sheepfold.strategies.heterolora import heterolora
from sheepfold.strategies.scaffold import scaffold
from sheepfold.strategies.slora import masked, slora
from tests.strategies.cohorts import SHAPES, a_state, best, learned, same
from tests.strategies.returns import RANKS, ROWS, a_round, a_start, returned, some_rounds


def stage(state: ServerState) -> dict[str, np.ndarray]:
    return {path: delta.delta().numpy() for path, delta in state.adapter.sparse.items()}


@settings(max_examples=30)
@given(st.floats(1e-4, 1), st.integers(1, 3000), st.integers(0, 99))
def test_a_mask_is_a_share_of_the_weight_and_at_least_one_number(density, numbers, seed):
    positions = masked(seed, density, "q", numbers)
    assert len(positions) == max(1, round(density * numbers))
    assert positions.dtype == torch.int64
    assert torch.equal(positions, positions.unique(sorted=True))
    assert 0 <= int(positions[0]) <= int(positions[-1]) < numbers


def test_a_mask_is_drawn_from_the_seed_and_the_module():
    assert torch.equal(masked(1, 0.1, "q", 900), masked(1, 0.1, "q", 900))
    assert not torch.equal(masked(1, 0.1, "q", 900), masked(2, 0.1, "q", 900))
    assert not torch.equal(masked(1, 0.1, "q", 900), masked(1, 0.1, "v", 900))


def test_a_mask_spreads_over_the_whole_weight():
    positions = masked(0, 0.3, "q", 10_000).numpy()
    counts, _ = np.histogram(positions, bins=10, range=(0, 10_000))
    assert counts.min() > 240  # 300 each, with a deviation of 14
    assert counts.max() < 360


def test_all_clients_and_rounds_share_one_mask():
    method = slora(fedavg(), 3, 0.3)
    state = method.begin(a_start())
    masks = {path: delta.positions for path, delta in state.adapter.sparse.items()}
    for _ in range(2):
        state = a_round(method, state)
        for client in ROWS:
            handed = method.assign(state, client, 1e-3).adapter.sparse
            assert all(torch.equal(handed[path].positions, masks[path]) for path in SHAPES)


def test_only_values_travel_in_the_sparse_rounds():
    method = slora(fedavg(), 3, 0.3)
    state = method.begin(a_start())
    values = sum(max(1, round(0.3 * d_in * d_out)) for d_in, d_out in SHAPES.values()) + 6  # and the head
    assert method.assign(state, "ann", 1e-3).nbytes == returned(method, state, "ann").nbytes == 4 * values


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 1), st.sampled_from(["rows", "uniform"]), st.sets(st.sampled_from(list(ROWS)), min_size=1))
def test_a_sparse_round_is_the_dense_mean(density, weights, there):
    method = slora(fedavg(weights), 3, density)
    state = a_round(method, method.begin(a_start()))
    updates = [returned(method, state, client) for client in sorted(there)]
    p = [ROWS[u.client] if weights == "rows" else 1.0 for u in updates]
    after = method.fold(state, updates)
    for path in SHAPES:
        expected = np.average([u.adapter.sparse[path].delta().numpy() for u in updates], axis=0, weights=p)
        np.testing.assert_allclose(stage(after)[path], expected, rtol=0, atol=1e-5)


def last_of_stage(method, rounds: int, state: ServerState) -> tuple[ServerState, dict[str, np.ndarray]]:
    """Return the state after the sparse rounds, and what they learned."""
    state = some_rounds(method, state, rounds - 1)
    updates = [returned(method, state, client) for client in ROWS]
    mean = {
        path: np.average([u.adapter.sparse[path].delta().numpy() for u in updates], axis=0, weights=list(ROWS.values()))
        for path in SHAPES
    }
    return method.fold(state, updates), mean


@pytest.mark.parametrize("rounds", [1, 3])
def test_lora_starts_from_the_best_pair_after_the_last_sparse_round(rounds):
    method = slora(fedavg(), rounds, 0.6)
    state, mean = last_of_stage(method, rounds, a_start(alpha=5.0))
    assert state.round == rounds
    assert not state.adapter.sparse
    assert not state.side.pairs
    assert state.adapter.ranks == RANKS
    for path, pair in state.adapter.pairs.items():
        np.testing.assert_allclose(pair.delta().numpy(), best(mean[path], RANKS[path]), rtol=0, atol=1e-4)
        assert pair.scale == 5.0 / RANKS[path]


def test_the_ranks_that_a_run_does_not_give_are_those_of_its_first_adapter():
    state = a_start()
    state = replace(state, setting=replace(state.setting, widest={}, ranks={}))
    assert last_of_stage(slora(fedavg(), 2, 0.5), 2, state)[0].adapter.ranks == RANKS


def test_a_kept_residual_makes_it_exactly_the_sparse_rounds_model():
    method = slora(fedavg(), 2, 0.6, residual="keep")
    state, mean = last_of_stage(method, 2, a_start())
    for path, matrix in learned(state).items():
        np.testing.assert_allclose(matrix, mean[path], rtol=0, atol=1e-5)
    assert method.assign(state, "ann", 1e-3).side is state.side
    assert a_round(method, state).side.hash() == state.side.hash()


def test_a_kept_residual_adds_to_what_is_beside_the_base_already():
    side = Adapter({"q": LoraPair(torch.ones(1, 6), torch.ones(5, 1), 1.0)})
    plain, _ = last_of_stage(slora(fedavg(), 1, 0.6, residual="keep"), 1, a_start())
    state, _ = last_of_stage(slora(fedavg(), 1, 0.6, residual="keep"), 1, replace(a_start(), side=side))
    np.testing.assert_allclose(learned(state)["q"], learned(plain)["q"] + 1, rtol=0, atol=1e-5)


def test_rows_that_the_sparse_rounds_do_not_fill_can_train():
    method = slora(fedavg(), 1, 1e-9)  # one number a module: a matrix of rank 1
    state, mean = last_of_stage(method, 1, a_start())
    for path, pair in state.adapter.pairs.items():
        np.testing.assert_allclose(pair.delta().numpy(), mean[path], rtol=0, atol=1e-5)
        assert bool(((pair.A != 0).any(1) | (pair.B != 0).any(0)).all())


@pytest.mark.parametrize("inner", [fedavg, fedit, fedex, flexlora, heterolora, lambda: fedprox(fedex(), 0.1)])
def test_then_the_inner_method_goes_on_as_if_it_had_begun_there(inner):
    method, of = slora(inner(), 2, 0.5), inner()
    state, _ = last_of_stage(method, 2, a_start())
    assert method.assign(state, "bob", 1e-3).adapter.hash() == of.assign(state, "bob", 1e-3).adapter.hash()
    same(a_round(method, state), a_round(of, state))


def test_the_inner_method_begins_when_its_rounds_do():
    state, mean = last_of_stage(slora(heterolora(), 1, 0.5), 1, a_start())
    assert {pair.scale for pair in state.adapter.pairs.values()} == {1.0}
    for path, matrix in learned(state).items():
        np.testing.assert_allclose(matrix, best(mean[path], RANKS[path]), rtol=0, atol=1e-5)


def test_clients_of_mixed_ranks_each_get_the_best_start_of_their_own():
    ranks = {"ann": {"q": 1, "v": 2}, "bob": {"q": 3, "v": 1}, "cleo": {"q": 2, "v": 4}}
    state, mean = last_of_stage(slora(flexlora(), 1, 0.9), 1, a_state(ranks))
    for client, own in ranks.items():
        for path, pair in slora(flexlora()).assign(state, client, 1e-3).adapter.pairs.items():
            np.testing.assert_allclose(pair.delta().numpy(), best(mean[path], own[path]), rtol=0, atol=1e-5)


def test_a_sparse_round_without_any_update_is_made_up_for():
    method = slora(fedavg(), 2, 0.5)
    state = a_round(method, method.begin(a_start()))
    state = a_round(method, state.advance(state.adapter))  # as the loop goes on from an empty round
    assert state.round == 3
    assert state.adapter.ranks == RANKS


def test_a_server_optimizer_around_it_steps_in_both_stages():
    method = fedadam(slora(fedavg(), 2, 0.5))
    first = some_rounds(method, a_start(), 1)
    assert {kind(key) for key in first.memory} == {"values", "extra"}
    later = a_round(method, a_round(method, first))
    assert {kind(key) for key in later.memory} == {"A", "B", "extra"}


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_the_state_survives_the_disk(rounds, tmp_path):
    method = slora(fedex(), 2, 0.5, residual="keep")
    state = some_rounds(method, a_start(), rounds)
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    same(a_round(method, read), a_round(method, state))


def test_order_of_arrival_and_equal_clients_leave_a_sparse_round_alone():
    method = slora(fedavg(), 3, 0.5)
    state = method.begin(a_start())
    updates = [returned(method, state, client) for client in ROWS]
    there, back = stage(method.fold(state, updates)), stage(method.fold(state, updates[::-1]))
    alike = stage(method.fold(state, [replace(updates[0], client=client) for client in ROWS]))
    for path in SHAPES:
        np.testing.assert_allclose(back[path], there[path], atol=1e-6)
        np.testing.assert_allclose(alike[path], updates[0].adapter.sparse[path].delta().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (flora, r"\[slora, flora\]: .* from any start, and flora has one of its own; slora goes with fedavg, fedit"),
        (ffa_lora, r"\[slora, ffa_lora\]: .* and ffa_lora has one of its own"),
        (lambda: fedadam(fedavg()), r"\[slora, fedadam, fedavg\]: fedadam inside slora would begin in the middle"),
        (lambda: scaffold(fedavg()), r"\[slora, scaffold, fedavg\]: scaffold inside slora would begin in the middle"),
        (lambda: slora(fedavg()), r"\[slora, slora, fedavg\]: slora inside slora would begin"),
    ],
)
def test_it_says_why_it_does_not_go_with_others(inner, why):
    with pytest.raises(ConfigError, match=why):
        slora(inner())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage_rounds": 0}, "_args.stage_rounds: found 0, expected a whole number above 0"),
        ({"stage_rounds": 2.5}, "_args.stage_rounds: found 2.5, expected a whole number above 0"),
        ({"density": 0}, "_args.density: found 0, expected above 0 and at most 1"),
        ({"density": 1.5}, "_args.density: found 1.5"),
        ({"residual": "kept"}, "_args.residual: no 'kept'; did you mean 'keep'"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        slora(fedavg(), **arguments)


def test_experiments_in_which_lora_would_never_start_are_refused():
    method = slora(fedavg(), 5)
    method.check(build({"federation": {"rounds": 6}}))
    with pytest.raises(ConfigError, match="stage_rounds 5: LoRA would never start in 5 rounds"):
        method.check(build({"federation": {"rounds": 5}}))
    with pytest.raises(ConfigError, match="slora: it makes the adapter it starts from; remove"):
        method.check(build({"federation": {"rounds": 6}, "adapter": {"start": "somewhere"}}))
