"""FedOpt: three rounds by hand for every server, the paper's algorithm in plain Python, and what must not move."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, kind
from sheepfold.errors import ConfigError
from sheepfold.state import BatchPlan, ServerState
from sheepfold.strategies.base import Strategy
from sheepfold.strategies.fed_sb import fed_sb
from sheepfold.strategies.fedavg import fedavg
from sheepfold.strategies.fedex import fedex
from sheepfold.strategies.fedopt import SERVERS, fedadagrad, fedadam, fedavgm, fedopt, fedyogi
from sheepfold.strategies.fedsa import fedsa
from sheepfold.strategies.ffa_lora import ffa_lora
from sheepfold.strategies.flexlora import flexlora
from sheepfold.strategies.rolora import rolora
from tests.strategies.cohorts import an_update, arrival_leaves_it_alone, cohorts, same, survives_the_disk
from tests.strategies.returns import a_round, a_start, some_rounds


def walk(method: Strategy, changes: list[float], start: float = 1.0) -> list[float]:
    """Return where one number goes when the clients' mean differs from it by these changes, round by round."""
    state = ServerState(0, Adapter(extra={"w": torch.tensor([start], dtype=torch.float64)}), BatchPlan(1, 1, 1))
    places = []
    for change in changes:
        learned = Adapter(extra={"w": state.adapter.extra["w"] + change})
        state = method.fold(state, [an_update("ann", learned)])
        places.append(float(state.adapter.extra["w"]))
    return places


@pytest.mark.parametrize(
    ("server", "options", "changes", "steps"),
    [
        # m: 1, 2.5, -2.75
        ("avgm", {"beta1": 0.5, "server_lr": 2}, [1, 2, -4], [2, 5, -5.5]),
        # m: 2, 2, 0; v: 4, 4, 4
        ("adam", {"beta1": 0.5, "beta2": 0.75, "v0": 0}, [4, 2, -2], [2 / (2 + 1), 2 / (2 + 1), 0]),
        # m: 2, 1, 0.5 - sqrt(3.5); v: 1 + 8 = 9, 9, 9 + 7 = 16
        (
            "yogi",
            {"beta1": 0.5, "beta2": 0.5, "v0": 1},
            [4, 0, -math.sqrt(14)],
            [2 / (3 + 1), 1 / (3 + 1), (0.5 - math.sqrt(3.5)) / (4 + 1)],
        ),
        # m: 3, 4, 12; v: 9, 25, 169
        ("adagrad", {"v0": 0}, [3, 4, 12], [3 / (3 + 1), 4 / (5 + 1), 12 / (13 + 1)]),
        # m: 2, 4, 1; v: tau^2 = 1, then 1 + 16, 17 + 36, 53 + 4
        (
            "adagrad",
            {"beta1": 0.5},
            [4, 6, -2],
            [2 / (math.sqrt(17) + 1), 4 / (math.sqrt(53) + 1), 1 / (math.sqrt(57) + 1)],
        ),
    ],
)
def test_three_rounds_by_hand(server, options, changes, steps):
    own = {"server_lr": 1.0} if server == "avgm" else {"server_lr": 1.0, "tau": 1}
    places = walk(fedopt(fedavg(), server, **(own | options)), changes)
    assert places == pytest.approx([1 + sum(steps[: i + 1]) for i in range(3)])


def paper(server: str, o: dict[str, float], changes: list[float]) -> list[float]:
    """Algorithm 2 of arXiv:2003.00295, and FedAvgM, for one number that starts at 1."""
    x, m, v = 1.0, 0.0, o.get("v0", o.get("tau", 0.0) ** 2)
    places = []
    for D in changes:
        if server == "avgm":
            m = o["beta1"] * m + D
            x = x + o["server_lr"] * m
        else:
            m = o["beta1"] * m + (1 - o["beta1"]) * D
            if server == "adam":
                v = o["beta2"] * v + (1 - o["beta2"]) * D**2
            if server == "yogi":
                assume(abs(v - D**2) > 1e-9)  # where they are equal, rounding decides the sign
                v = v - (1 - o["beta2"]) * D**2 * ((v > D**2) - (v < D**2))
            if server == "adagrad":
                v = v + D**2
            x = x + o["server_lr"] * m / (math.sqrt(v) + o["tau"])
        places.append(x)
    return places


share = st.floats(0, 0.99)
options = st.fixed_dictionaries(
    {"server_lr": st.floats(1e-3, 2), "beta1": share, "beta2": share, "tau": st.floats(1e-3, 1)},
    optional={"v0": st.floats(0, 1)},
)


@given(st.sampled_from(list(SERVERS)), options, st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_every_server_is_the_papers_algorithm(server, given_options, changes):
    own = {name: value for name, value in given_options.items() if name in SERVERS[server]}
    assert walk(fedopt(fedavg(), server, **own), changes) == pytest.approx(
        paper(server, own, changes), rel=1e-7, abs=1e-9
    )


@settings(max_examples=25)
@given(cohorts(mixed=False), st.sampled_from([fedavg, fedex]))
def test_avgm_without_momentum_at_rate_1_is_the_inner_method_to_the_bit(cohort, inner):
    plain, stepped = inner(), fedavgm(inner(), server_lr=1, beta1=0)
    left = right = cohort.state
    for _ in range(2):
        left, right = plain.fold(left, cohort.updates), stepped.fold(right, cohort.updates)
    same(replace(right, memory={}), left)


def test_the_residual_stays_as_fedex_computes_it():
    state = a_start()
    inner, stepped = a_round(fedex(), state), a_round(fedadam(fedex()), state)
    assert stepped.side.hash() == inner.side.hash()
    assert stepped.adapter.hash() != inner.adapter.hash()


METHODS = [fedavgm, fedadam, fedyogi, fedadagrad]


@settings(max_examples=10)
@given(cohorts(mixed=False), st.sampled_from(METHODS))
def test_order_of_arrival_leaves_it_alone(cohort, around):
    arrival_leaves_it_alone(around(fedavg(), server_lr=0.5), cohort)


@pytest.mark.parametrize("around", METHODS)
def test_equal_clients_do_what_one_of_them_does(around):
    method, state = around(fedavg(), server_lr=0.5), a_start()
    learned = a_round(fedavg(), state, ["ann"]).adapter
    everybody = method.fold(state, [an_update(c, learned, n) for c, n in (("ann", 5), ("bob", 5), ("cleo", 10))])
    alone = method.fold(state, [an_update("ann", learned, 5)])
    for name, tensor in alone.adapter.tensors().items():
        torch.testing.assert_close(everybody.adapter.tensors()[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("around", METHODS)
def test_absent_clients_take_no_part(around):
    method, state = around(fedavg()), a_round(around(fedavg()), a_start())
    there = [an_update(c, a_round(fedavg(), state, [c]).adapter, n) for c, n in (("ann", 7), ("cleo", 3))]
    mean = fedavg().fold(state, there).adapter
    same(method.fold(state, there), method.fold(state, [an_update("ann", mean, 1)]))


@pytest.mark.parametrize("around", METHODS)
@pytest.mark.parametrize(("inner", "still"), [(ffa_lora, {"A"}), (fedsa, {"B"})])
def test_what_never_trains_never_moves(around, inner, still):
    method, state = around(inner(), server_lr=0.5), a_start()
    after = some_rounds(method, state, 3)
    for name, tensor in state.adapter.tensors().items():
        assert torch.equal(after.adapter.tensors()[name], tensor) == (kind(name) in still)
    assert not any(kind(key) in still for key in after.memory)


@pytest.mark.parametrize("around", METHODS)
def test_left_over_momentum_does_not_move_a_factor_that_rests(around):
    method = around(rolora(), server_lr=0.5)
    state = some_rounds(method, a_start(), 2)
    for rests in ("A", "B", "A"):
        after = a_round(method, state)
        for name, tensor in state.adapter.tensors().items():
            assert torch.equal(after.adapter.tensors()[name], tensor) == (kind(name) == rests)
        for key, moment in state.memory.items():
            assert torch.equal(after.memory[key], moment) == (kind(key) == rests)
        state = after


def test_moments_go_where_the_adapter_changes_its_form():
    method = fedadam(fed_sb())
    state = some_rounds(method, a_start(), 1)
    assert set(map(kind, state.memory)) == {"extra"}
    assert set(map(kind, a_round(method, state).memory)) == {"extra", "core"}


def test_moments_are_float64_and_the_adapter_stays_float32():
    state = some_rounds(fedyogi(fedavg()), a_start(), 2)
    assert {t.dtype for t in state.memory.values()} == {torch.float64}
    assert {t.dtype for t in state.adapter.tensors().values()} == {torch.float32}


@settings(max_examples=5)
@given(cohort=cohorts(mixed=False), around=st.sampled_from(METHODS))
def test_the_state_survives_the_disk(cohort, around, tmp_path_factory):
    survives_the_disk(around(fedavg()), cohort, tmp_path_factory.mktemp("state") / "state.safetensors")


def test_another_methods_memory_stays():
    state = replace(a_start(), memory={"other": torch.ones(2)})
    assert "other" in a_round(fedadam(fedavg()), state).memory


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ("avgm", {"beta2": 0.9}, r"_args.beta2: fedavgm has none; it takes server_lr, beta1"),
        ("avgm", {"tau": 1e-3}, r"_args.tau: fedavgm has none"),
        ("adagrad", {"beta2": 0.9}, r"_args.beta2: fedadagrad has none; it takes server_lr, beta1, tau, v0"),
        ("adam", {"tau": 0}, r"_args.tau: found 0, expected a number above 0"),
        ("adam", {"beta1": 1}, r"_args.beta1: found 1, expected at least 0 and below 1"),
        ("yogi", {"v0": -1}, r"_args.v0: found -1, expected a number of at least 0"),
        ("yogi", {"server_lr": "fast"}, r"_args.server_lr: found 'fast', expected a number above 0"),
        ("adamw", {}, r"_args.server: no 'adamw'; did you mean 'adam'"),
    ],
)
def test_options_that_cannot_be_are_one_line(server, options, message):
    with pytest.raises(ConfigError, match=message):
        fedopt(fedavg(), server, **options)


def test_methods_whose_coordinates_change_are_refused():
    with pytest.raises(ConfigError, match=r"\[fedadam, flexlora\]: flexlora's factors change coordinates each round"):
        fedadam(flexlora())


def test_two_server_optimizers_are_refused():
    with pytest.raises(ConfigError, match=r"\[fedyogi, fedadam, fedavg\]: two server optimizers; choose one"):
        fedyogi(fedadam(fedavg()))
