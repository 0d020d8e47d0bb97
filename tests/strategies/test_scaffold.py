"""SCAFFOLD: its client half by hand, whole runs against the paper's algorithm in numpy, and whom it goes with."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, kind
from sheepfold.config import Experiment, build
from sheepfold.errors import ConfigError
from sheepfold.local.rules import Trained
from sheepfold.messages import Assignment, Update
from sheepfold.state import BatchPlan, ServerState, Setting, load, save
from sheepfold.strategies.base import Strategy
from sheepfold.strategies.fed_sb import fed_sb
from sheepfold.strategies.fedavg import fedavg, fedit
from sheepfold.strategies.fedex import fedex
from sheepfold.strategies.fedopt import fedadam
from sheepfold.strategies.fedprox import fedprox
from sheepfold.strategies.fedsa import fedsa
from sheepfold.strategies.ffa_lora import ffa_lora
from sheepfold.strategies.flexlora import flexlora
from sheepfold.strategies.heterolora import heterolora
from sheepfold.strategies.hetlora import hetlora
from sheepfold.strategies.rolora import rolora
from sheepfold.strategies.scaffold import VARIATE, scaffold
from sheepfold.strategies.slora import slora
from tests.strategies.cohorts import an_update, same
from tests.strategies.returns import a_round, a_start, returned

CLIENTS = ("ann", "bob", "cleo")
CURVES = {"ann": (1.0, -1.0), "bob": (3.0, 2.0), "cleo": (0.5, 4.0)}
"""Client -> (a, b): its loss is a/2 (w - b)^2, its gradient a (w - b)."""
NAME = "w/extra"


def one_number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def a_number(start: float = 0.0) -> ServerState:
    return ServerState(0, Adapter(extra={"w": one_number(start)}), BatchPlan(1, 1, 1), setting=Setting(clients=CLIENTS))


def by_sgd(method: Strategy, handed: Assignment, own: dict, steps: int, lr: float) -> tuple[Update, dict]:
    """Return what a client returns and keeps: plain SGD on its curve, under the method's local rule."""
    a, b = CURVES[handed.client]
    y, gradients = handed.adapter.extra["w"].clone(), []
    shift = method.local.correction(handed, own).get(NAME, 0.0) if method.local else 0.0
    for _ in range(steps):
        gradients.append(a * (y - b))
        y = y - lr * (gradients[-1] + shift)
    trained = Trained(Adapter(extra={"w": y}), own, {NAME: torch.stack(gradients).mean(0)})
    done = method.local.finish(handed, trained) if method.local else trained
    return replace(an_update(handed.client, done.adapter), memory=done.send), dict(done.own)


def run(
    method: Strategy, cohorts: Sequence[Sequence[str]], steps: int = 3, lr: float = 0.1
) -> tuple[ServerState, dict]:
    state, own = a_number(), {client: {} for client in CLIENTS}
    for cohort in cohorts:
        updates = []
        for client in cohort:
            update, own[client] = by_sgd(method, method.assign(state, client, lr), own[client], steps, lr)
            updates.append(update)
        state = method.fold(state, updates)
    return state, own


def paper(cohorts: Sequence[Sequence[str]], steps: int = 3, lr: float = 0.1, server_lr: float = 1.0) -> tuple:
    """Algorithm 1 of arXiv:1910.06378 with option II, in numpy: x, c and every c_i at the end."""
    x, c, c_i = 0.0, 0.0, dict.fromkeys(CLIENTS, 0.0)
    for cohort in cohorts:
        dy, dc = [], []
        for i in cohort:
            a, b = CURVES[i]
            y = x
            for _ in range(steps):
                y = y - lr * (a * (y - b) - c_i[i] + c)
            plus = c_i[i] - c + (x - y) / (steps * lr)
            dy.append(y - x)
            dc.append(plus - c_i[i])
            c_i[i] = plus
        x, c = x + server_lr * np.mean(dy), c + len(cohort) / len(CLIENTS) * np.mean(dc)
    return x, c, c_i


def test_two_steps_by_hand():
    # ann: gradient w + 1, from w = 0; c = 0.5, c_ann = 0.2, so 0.3 is added to each; rate 0.1
    # steps: 1 + 0.3 -> w = -0.13, then 0.87 + 0.3 -> w = -0.247;  c_ann+ = (1 + 0.87) / 2 = 0.935
    method, state = scaffold(fedavg()), replace(a_number(), memory={VARIATE + NAME: one_number(0.5)})
    handed = method.assign(state, "ann", 0.1)
    update, own = by_sgd(method, handed, {VARIATE + NAME: one_number(0.2)}, steps=2, lr=0.1)
    assert float(update.adapter.extra["w"]) == pytest.approx(-0.247)
    assert float(own[VARIATE + NAME]) == pytest.approx(0.935)
    assert float(update.memory[VARIATE + NAME]) == pytest.approx(0.735)
    # option II: c_k - c + (x - y) / (steps lr) = 0.2 - 0.5 + 0.247 / 0.2
    assert float(own[VARIATE + NAME]) == pytest.approx(0.2 - 0.5 + 0.247 / 0.2)
    # N = 3 clients in all: c + 0.735 / 3, and x is the only client's
    after = method.fold(state, [update])
    assert float(after.memory[VARIATE + NAME]) == pytest.approx(0.745)
    assert float(after.adapter.extra["w"]) == pytest.approx(-0.247)


some_cohorts = st.lists(st.lists(st.sampled_from(CLIENTS), min_size=1, unique=True).map(sorted), min_size=1, max_size=5)


@settings(max_examples=50)
@given(some_cohorts, st.integers(1, 4), st.floats(0.01, 0.2), st.floats(0.1, 1.5))
def test_whole_runs_are_the_papers_algorithm(cohorts, steps, lr, server_lr):
    state, own = run(scaffold(fedavg("uniform"), server_lr), cohorts, steps, lr)
    x, c, c_i = paper(cohorts, steps, lr, server_lr)
    assert float(state.adapter.extra["w"]) == pytest.approx(x, abs=1e-9)
    assert float(state.memory[VARIATE + NAME]) == pytest.approx(c, abs=1e-9)
    for client in CLIENTS:
        assert float(own[client].get(VARIATE + NAME, 0.0)) == pytest.approx(c_i[client], abs=1e-9)


def test_the_servers_variate_is_the_mean_of_the_clients():
    state, own = run(scaffold(fedavg()), [["ann"], ["bob", "cleo"], ["ann", "cleo"]])
    mean = sum(float(kept[VARIATE + NAME]) for kept in own.values()) / 3
    assert float(state.memory[VARIATE + NAME]) == pytest.approx(mean, abs=1e-12)


def test_unlike_clients_meet_at_the_best_common_place_which_fedavg_misses():
    best = sum(a * b for a, b in CURVES.values()) / sum(a for a, _ in CURVES.values())
    everybody = [CLIENTS] * 60
    with_variates, _ = run(scaffold(fedavg("uniform")), everybody)
    without, _ = run(fedavg("uniform"), everybody)
    assert float(with_variates.adapter.extra["w"]) == pytest.approx(best, abs=1e-4)
    assert abs(float(without.adapter.extra["w"]) - best) > 0.02


def test_equal_clients_need_no_correction_from_the_second_round_on():
    method = scaffold(fedavg())
    variate = {VARIATE + NAME: one_number(0.7)}
    handed = method.assign(replace(a_number(), memory=variate), "ann", 0.1)
    assert float(method.local.correction(handed, variate)[NAME]) == 0


def test_the_first_round_is_fedavgs_and_sends_no_variates_down():
    method, state = scaffold(fedavg()), a_start()
    handed = method.assign(state, "ann", 0.1)
    assert handed.memory == {}
    assert handed.nbytes == fedavg().assign(state, "ann", 0.1).nbytes
    assert method.local.correction(handed, {}) == {}
    same(a_round(method, state), a_round(fedavg(), state))


def with_variates(method: Strategy, state: ServerState, client: str) -> Update:
    update = returned(method, state, client)
    gradients = {n: torch.ones_like(t) for n, t in update.adapter.tensors().items() if n not in update.unsent}
    done = method.local.finish(method.assign(state, client, 0.1), Trained(update.adapter, {}, gradients))
    return replace(update, memory=done.send)


def test_a_variate_travels_as_its_tensor_does_both_ways():
    method, state = scaffold(fedavg()), a_start()
    updates = [with_variates(method, state, client) for client in ("ann", "bob")]
    assert updates[0].nbytes == 2 * state.adapter.nbytes()
    after = method.fold(state, updates)
    assert method.assign(after, "cleo", 0.1).nbytes == 2 * after.adapter.nbytes()
    assert {t.dtype for t in after.memory.values()} == {torch.float32}


def test_order_of_arrival_leaves_it_alone():
    method, state = scaffold(fedavg(), 0.7), a_start()
    updates = [with_variates(method, state, client) for client in CLIENTS]
    there, back = method.fold(state, updates), method.fold(state, updates[::-1])
    for name, tensor in (there.adapter.tensors() | there.memory).items():
        torch.testing.assert_close((back.adapter.tensors() | back.memory)[name], tensor)


def test_what_is_frozen_has_no_correction_and_its_variate_rests_at_the_server():
    method, state = scaffold(rolora()), a_start()
    state = method.fold(state, [with_variates(method, state, "ann")])
    state = method.fold(state, [with_variates(method, state, "ann")])
    handed = method.assign(state, "ann", 0.1)
    assert {VARIATE + "q/A", VARIATE + "q/B"} <= state.memory.keys()
    assert {kind(name) for name in handed.memory} == {"B", "extra"}
    assert {kind(name) for name in method.local.correction(handed, state.memory)} == {"B", "extra"}


def test_a_frozen_factor_never_moves_whatever_the_servers_rate():
    method, state = scaffold(ffa_lora(), 0.3), a_start()
    after = a_round(method, a_round(method, state))
    for path, pair in state.adapter.pairs.items():
        assert torch.equal(after.adapter.pairs[path].A, pair.A)


def test_what_a_client_kept_of_other_rounds_stays():
    rule, handed = scaffold(fedavg()).local, scaffold(fedavg()).assign(a_number(), "ann", 0.1)
    own = {"own/x": torch.ones(1), VARIATE + "y/extra": torch.ones(1)}
    done = rule.finish(handed, Trained(handed.adapter, own, {NAME: one_number(2.0)}, {"said": torch.ones(1)}))
    assert done.own.keys() == own.keys() | {VARIATE + NAME}
    assert done.send.keys() == {"said", VARIATE + NAME}


def test_the_state_survives_the_disk(tmp_path):
    method, state = scaffold(fedex(), 0.5), a_start()
    state = method.fold(state, [with_variates(method, state, client) for client in CLIENTS])
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    same(a_round(method, read), a_round(method, state))


@pytest.mark.parametrize("inner", [fedavg, fedit, fedex, ffa_lora, rolora, lambda: fedprox(fedavg(), 0.1)])
def test_it_goes_with_methods_whose_tensors_are_the_same_for_all(inner):
    method = scaffold(inner())
    assert method.local.mean_gradient
    assert method.local.penalty is (inner().local and method.local.penalty)


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (flexlora, r"\[scaffold, flexlora\]: flexlora's factors change coordinates each round, and a variate is"),
        (
            heterolora,
            r"\[scaffold, heterolora\]: heterolora's clients may have other ranks, and a variate has the shape",
        ),
        (hetlora, r"\[scaffold, hetlora\]: hetlora's clients may have other ranks"),
        (fedsa, r"\[scaffold, fedsa\]: fedsa's clients keep tensors to themselves"),
        (fed_sb, r"\[scaffold, fed_sb\]: a variate belongs to one A or B .*, and fed_sb trains other tensors"),
        (lambda: slora(fedavg()), r"\[scaffold, slora, fedavg\]: .* and slora trains other tensors"),
    ],
)
def test_it_says_why_it_does_not_go_with_others(inner, why):
    with pytest.raises(ConfigError, match=why + ".*; scaffold goes with fedavg, fedit, fedex, ffa_lora, rolora$"):
        scaffold(inner())


def test_a_server_optimizer_may_stand_around_it():
    method, state = fedadam(scaffold(fedavg())), a_start()
    after = method.fold(state, [with_variates(method, state, "ann")])
    assert {key.split("/")[0] for key in after.memory} == {"fedopt", "variate"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"optimizer": "adam"}}, "found train.optimizer 'adam'; set it to sgd, as in the paper, or to adamw"),
        (
            {"train": {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}}},
            "plain SGD, found momentum; set it to 0",
        ),
        ({"train": {"optimizer": "sgd", "weight_decay": 0.1}}, "plain SGD, found weight_decay"),
        ({"personal": {"keep_local": ["q"]}}, "remove personal.keep_local"),
    ],
)
def test_experiments_it_cannot_run_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        scaffold(fedavg()).check(build(settings))


def test_adamw_and_plain_sgd_may_run():
    scaffold(fedit()).check(Experiment())
    scaffold(fedavg()).check(build({"train": {"optimizer": "SGD"}}))
    with pytest.raises(ConfigError, match="fedit"):
        scaffold(fedit()).check(build({"train": {"optimizer": "sgd"}}))


@pytest.mark.parametrize("rate", [0, -1, "x"])
def test_a_server_rate_that_goes_nowhere_is_one_line(rate):
    with pytest.raises(ConfigError, match=r"_args.server_lr: found .*, expected a number above 0"):
        scaffold(fedavg(), rate)
