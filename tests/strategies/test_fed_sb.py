"""Fed-SB: exact against the dense mean of products, the frames of both starts, and the few numbers that travel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.adapter import LoraPair, kind, nbytes
from sheepfold.config import build
from sheepfold.errors import ConfigError
from sheepfold.state import load, save
from sheepfold.strategies.fed_sb import fed_sb, framed
from tests.strategies.cohorts import SHAPES, best, same
from tests.strategies.returns import RANKS, ROWS, a_round, a_start, base_weight, returned, silent, some_rounds

START = st.sampled_from(["gradient", "base"])


def whole(adapter) -> dict[str, np.ndarray]:
    """Return what an adapter adds to each weight, multiplied out in numpy."""
    made = {path: d.delta().numpy() for path, d in adapter.sparse.items()}
    for path, p in adapter.pairs.items():
        made[path] = p.scale * (p.B.double().numpy() @ p.core.double().numpy() @ p.A.double().numpy())
    return made


@settings(max_examples=40, deadline=None)
@given(
    START,
    st.integers(0, 999),
    st.integers(1, 3),
    st.sampled_from(["rows", "uniform"]),
    st.sets(st.sampled_from(list(ROWS)), min_size=1),
)
def test_the_fold_is_the_mean_of_the_products_exactly(start, seed, rounds, weights, there):
    method = fed_sb(start, weights)
    state = some_rounds(method, a_start(seed), rounds)
    updates = [returned(method, state, client, seed) for client in sorted(there)]
    p = [ROWS[u.client] if weights == "rows" else 1.0 for u in updates]
    folded = whole(method.fold(state, updates).adapter)
    for path in SHAPES:
        expected = np.average([whole(u.adapter)[path] for u in updates], axis=0, weights=p)
        np.testing.assert_allclose(folded[path], expected, rtol=0, atol=1e-4)


def test_the_first_round_trains_the_adapted_weights_whole():
    method, state = fed_sb(), fed_sb().begin(a_start())
    handed = method.assign(state, "ann", 1e-3)
    assert not handed.adapter.pairs
    assert not handed.frozen
    for path, (d_in, d_out) in SHAPES.items():
        delta = handed.adapter.sparse[path]
        assert delta.shape == (d_out, d_in)
        assert torch.equal(delta.positions, torch.arange(d_in * d_out))
        assert not delta.values.any()


def test_the_best_part_of_the_first_rounds_progress_is_kept():
    method, state = fed_sb(), fed_sb().begin(a_start(alpha=5.0))
    updates = [returned(method, state, client) for client in ROWS]
    after = method.fold(state, updates)
    for path, pair in after.adapter.pairs.items():
        mean = np.average([whole(u.adapter)[path] for u in updates], axis=0, weights=list(ROWS.values()))
        r = RANKS[path]
        np.testing.assert_allclose(whole(after.adapter)[path], best(mean, r), rtol=0, atol=1e-5)
        np.testing.assert_allclose(pair.B.T @ pair.B, np.eye(r), rtol=0, atol=1e-5)
        np.testing.assert_allclose(pair.A @ pair.A.T, np.eye(r), rtol=0, atol=1e-5)
        values = np.linalg.svd(mean, compute_uv=False)[:r]
        np.testing.assert_allclose(pair.core, np.diag(values) / pair.scale, rtol=0, atol=1e-5)
        assert pair.scale == 5.0 / r


def test_directions_without_progress_are_orthonormal_and_can_train():
    pair = framed(LoraPair(torch.zeros(2, 6), torch.zeros(5, 2), 8.0))
    torch.testing.assert_close(pair.B.T @ pair.B, torch.eye(2))
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(2))
    assert not pair.core.any()


def test_the_base_start_lies_inside_the_base_and_changes_nothing():
    state = fed_sb("base").begin(a_start())
    for path, pair in state.adapter.pairs.items():
        np.testing.assert_allclose(pair.B @ pair.A, best(base_weight(path).double().numpy(), RANKS[path]), atol=1e-5)
        np.testing.assert_allclose(pair.A @ pair.A.T, np.eye(RANKS[path]), rtol=0, atol=1e-5)
        assert not pair.core.any()
        assert pair.scale == 16 / RANKS[path]


def test_the_base_start_is_the_same_wherever_it_is_made():
    turned = replace(a_start(), setting=replace(a_start().setting, weight=lambda path: base_weight(path).clone()))
    same(fed_sb("base").begin(a_start()), fed_sb("base").begin(turned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["gradient", "base"])
def test_the_frame_is_frozen_to_the_bit(start, dtype):
    method, state = fed_sb(start), a_start()
    state = some_rounds(method, replace(state, adapter=state.adapter.to(dtype)), 1)
    assert method.assign(state, "ann", 1e-3).frozen == {"A", "B"}
    after = a_round(method, a_round(method, state))
    for name, tensor in state.adapter.tensors().items():
        assert torch.equal(after.adapter.tensors()[name], tensor) == (kind(name) in "AB")


def test_r_squared_numbers_a_module_go_up():
    numbers = sum(r * r for r in RANKS.values()) + 6  # and the head's
    for start in ("gradient", "base"):
        state = some_rounds(fed_sb(start), a_start(), 2)
        assert returned(fed_sb(start), state, "ann").nbytes == 4 * numbers
        frame = nbytes({n: t for n, t in state.adapter.tensors().items() if kind(n) in "AB"})
        down = 4 * numbers + (frame if start == "gradient" else 0)
        assert fed_sb(start).assign(state, "ann", 1e-3).nbytes == down


def test_the_first_round_sends_every_adapted_weight():
    method, state = fed_sb(), fed_sb().begin(a_start())
    numbers = sum(d_in * d_out for d_in, d_out in SHAPES.values()) + 6
    assert method.assign(state, "ann", 1e-3).nbytes == returned(method, state, "ann").nbytes == 4 * numbers
    assert "q/positions" in silent(method, method.assign(state, "ann", 1e-3))


def test_order_of_arrival_and_equal_clients_leave_it_alone():
    method = fed_sb("base")
    state = some_rounds(method, a_start(), 1)
    updates = [returned(method, state, client) for client in ROWS]
    there, back = whole(method.fold(state, updates).adapter), whole(method.fold(state, updates[::-1]).adapter)
    alike = whole(method.fold(state, [replace(updates[0], client=client) for client in ROWS]).adapter)
    for path in SHAPES:
        np.testing.assert_allclose(back[path], there[path], atol=1e-5)
        np.testing.assert_allclose(alike[path], whole(updates[0].adapter)[path], atol=1e-5)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_state_survives_the_disk(rounds, tmp_path):
    state = some_rounds(fed_sb(), a_start(), rounds)
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    same(a_round(fed_sb(), read), a_round(fed_sb(), state))


def test_a_first_round_without_any_update_is_made_up_for():
    state = fed_sb().begin(a_start())
    state = state.advance(state.adapter)  # as the loop goes on from an empty round
    assert a_round(fed_sb(), state).adapter.pairs.keys() == SHAPES.keys()


def test_it_trains_what_plain_peft_has_no_layer_for():
    assert fed_sb().beyond_peft


def test_what_cannot_be_is_one_line():
    with pytest.raises(ConfigError, match=r"_args.start: no 'random'; known: base, gradient"):
        fed_sb("random")
    with pytest.raises(ConfigError, match=r"fed_sb: it makes the adapter .*; remove adapter.start old/adapter"):
        fed_sb().check(build({"adapter": {"start": "old/adapter"}}))
    blind = replace(a_start(), setting=replace(a_start().setting, weight=None))
    with pytest.raises(ConfigError, match="start base: needs the base's weights"):
        fed_sb("base").begin(blind)
