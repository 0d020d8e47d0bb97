"""Client halves in the cohort engine against one client trained by hand: plain autograd through dense weights, its own
clipping and steps, and each method's equations written out. Rows and targets are the engine's; nothing else is shared.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sheepfold.adapter import Adapter, kind
from sheepfold.config import TrainSettings
from sheepfold.local.rules import Factors, LocalRule
from sheepfold.local.steps import step_rows
from sheepfold.messages import Assignment
from sheepfold.state import BatchPlan, ServerState, Setting
from sheepfold.strategies.base import Strategy
from sheepfold.strategies.fed_sb import fed_sb
from sheepfold.strategies.fedavg import fedavg
from sheepfold.strategies.fedprox import fedprox
from sheepfold.strategies.fedsa import fedsa, is_B
from sheepfold.strategies.ffa_lora import ffa_lora
from sheepfold.strategies.rolora import rolora
from sheepfold.strategies.scaffold import VARIATE, scaffold
from sheepfold.strategies.slora import slora
from tests import small

SGD = TrainSettings(steps=2, batch_rows=3, micro_rows=2, optimizer="sgd", lr=0.05)
ADAMW = TrainSettings(steps=2, batch_rows=3, micro_rows=2, lr=2e-3, weight_decay=0.1)
COHORT = ("ann", "bob")
SEED = 1
TOKENS, ROWS = small.tokens(longest=16), small.client_rows()
Tensors = Mapping[str, Tensor]


@pytest.fixture
def base():
    return small.model()


def a_state(base) -> ServerState:
    """Return a state of rank 4 in float64, with something in every factor."""
    setting = Setting(seed=SEED, clients=tuple(ROWS), weight=lambda path: base.get_submodule(path).weight)
    return ServerState(0, small.adapter(base, 4, 0), BatchPlan(2, 2, 120), setting=setting)


def drawn(state: ServerState, train: TrainSettings, clients=COHORT) -> ServerState:
    """Return the state with its clients' steps and updates counted, as the loop counts them."""
    steps = {client: state.drawn.get(client, 0) + (train.steps or 0) for client in clients}
    return replace(state, drawn={**state.drawn, **steps}, counted=dict.fromkeys(clients, state.round))


def by_engine(base, method: Strategy, train: TrainSettings) -> Callable:
    """Return a function that takes a state through one round of the cohort, and the engine's updates."""
    engine = small.cohort_engine(base, train, rule=method.local, private=method.private, seed=SEED, tokens=TOKENS)

    def a_round(state: ServerState):
        updates = list(engine.train([method.assign(state, client, train.lr) for client in COHORT]))
        return drawn(method.fold(state, updates), train), {u.client: u for u in updates}

    return a_round


def dense(adapter: Adapter, tensors: Tensors) -> dict[str, Tensor]:
    """Return what each module's weight changes by, by these tensors: scale B A, scale B core A, or values in place."""
    changes = {}
    for path, pair in adapter.pairs.items():
        A, B = tensors[f"{path}/A"], tensors[f"{path}/B"]
        changes[path] = pair.scale * (B @ tensors[f"{path}/core"] if pair.core is not None else B) @ A
    for path, delta in adapter.sparse.items():
        d_out, d_in = delta.shape
        zeros = torch.zeros(d_out * d_in, dtype=torch.float64)
        changes[path] = zeros.index_put((delta.positions,), tensors[f"{path}/values"]).view(d_out, d_in)
    return changes


def loss_of(base, rows, changes: Tensors) -> Tensor:
    """Return the mean loss of the rows' target tokens, each predicted from those before it, row by row."""
    hooks = []
    for path, change in changes.items():

        def add(_module, args, out, change=change):
            return out + args[0] @ change.T

        hooks.append(base.get_submodule(path).register_forward_hook(add))
    losses = []
    for row in rows:
        span = slice(TOKENS.offsets[row], TOKENS.offsets[row + 1])
        ids, target = torch.from_numpy(TOKENS.ids[span]).long(), torch.from_numpy(TOKENS.is_target[span])
        nats = -torch.log_softmax(base(ids[None]).logits[0, :-1], 1).gather(1, ids[1:, None])[:, 0]
        losses.append(nats[target[1:]])
    for hook in hooks:
        hook.remove()
    return torch.cat(losses).mean()


def by_hand(
    base, handed: Assignment, train: TrainSettings, *, shift: Tensors | None = None, mu: float = 0.0
) -> Tensors:
    """Return one client's tensors after its steps; shift is added to clipped gradients, mu is FedProx's."""
    adapter = handed.adapter
    fixed = {n: t for n, t in adapter.tensors().items() if kind(n) in handed.frozen or kind(n) == "positions"}
    start = {n: t for n, t in adapter.tensors().items() if n not in fixed}
    now = {n: t.clone().requires_grad_() for n, t in start.items()}
    kind_of = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[train.optimizer]
    optimizer = kind_of(now.values(), train.lr, weight_decay=train.weight_decay)
    beside = {path: pair.delta() for path, pair in handed.side.pairs.items()}
    for step in range(train.steps):
        rows = step_rows(SEED, handed.client, ROWS[handed.client], train.batch_rows, handed.first_step + step)
        changes = {path: t + beside.get(path, 0) for path, t in dense(adapter, {**fixed, **now}).items()}
        loss = loss_of(base, rows, changes)
        loss = loss + mu / 2 * sum(((now[n] - start[n]) ** 2).sum() for n in now)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((t.grad**2).sum() for t in now.values()))
        for name, t in now.items():
            if train.grad_norm is not None:
                t.grad *= min(1.0, train.grad_norm / (float(norm) + 1e-6))
            if shift:
                t.grad += shift[name]
        optimizer.step()
    return {n: t.detach() for n, t in now.items()}


def same(found: Tensors, expected: Tensors) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)


def each_round_by_hand(base, method: Strategy, train: TrainSettings, rounds: int, **over) -> ServerState:
    """Assert, round by round, that every client of the engine returns what it has by hand; return the last state."""
    state, a_round = method.begin(a_state(base)), by_engine(base, method, train)
    for _ in range(rounds):
        after, updates = a_round(state)
        for client, update in updates.items():
            handed = method.assign(state, client, train.lr)
            same(update.adapter.tensors(), by_hand(base, handed, train, **over))
            start, sent = handed.adapter.tensors(), update.adapter.tensors().keys() - update.unsent
            assert {n for n, t in update.adapter.tensors().items() if not torch.equal(t, start[n])} == sent
        state = after
    return state


@pytest.mark.parametrize("train", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_fedprox_clients_descend_their_loss_and_their_distance(base, train):
    each_round_by_hand(base, fedprox(fedavg(), 2.0), train, 2, mu=2.0)


def test_fedprox_with_mu_0_is_fedavg_to_the_bit(base):
    start, hashes = a_state(base), set()
    for method in (fedprox(fedavg(), 0), fedavg()):
        after, _ = by_engine(small.model(), method, ADAMW)(start)
        hashes.add(after.adapter.hash())
    assert len(hashes) == 1


@pytest.mark.parametrize("grad_norm", [None, 0.1], ids=["unclipped", "clipped"])
def test_scaffold_is_option_II_written_out(base, grad_norm):
    """x, c and c_k of Algorithm 1, arXiv:1910.06378; c_k+ = c_k - c + (x - y_k) / (steps lr), never a mean gradient."""
    train = SGD.model_copy(update={"grad_norm": grad_norm})
    method, server_lr, N = scaffold(fedavg("uniform"), server_lr=0.8), 0.8, len(ROWS)
    state, a_round = a_state(base), by_engine(base, method, train)
    x = dict(state.adapter.tensors())
    c = {n: torch.zeros_like(t) for n, t in x.items()}
    c_k = {client: dict(c) for client in COHORT}
    for _ in range(3):
        y, before = {}, dict(c)
        for client in COHORT:
            handed = replace(fedavg().assign(state, client, train.lr), adapter=state.adapter.holding(x))
            shift = {n: before[n] - c_k[client][n] for n in x}
            y[client] = by_hand(base, handed, train, shift=shift)
            plus = {n: c_k[client][n] - before[n] + (x[n] - y[client][n]) / (train.steps * train.lr) for n in x}
            c = {n: c[n] + (plus[n] - c_k[client][n]) / N for n in x}
            c_k[client] = plus
        state, updates = a_round(state)
        for client in COHORT:
            same(updates[client].adapter.tensors(), y[client])
        x = {n: x[n] + server_lr * (sum(y[client][n] for client in COHORT) / 2 - x[n]) for n in x}
        same(state.adapter.tensors(), x)
        same({n.removeprefix(VARIATE): t for n, t in state.memory.items()}, c)


def test_scaffold_gives_adamw_the_corrected_gradient(base):
    method = scaffold(fedavg())
    state, a_round = a_state(base), by_engine(base, method, ADAMW)
    kept = {client: {} for client in COHORT}
    for _ in range(2):
        handed = {client: method.assign(state, client, ADAMW.lr) for client in COHORT}
        shifts = {client: method.local.correction(handed[client], kept[client]) for client in COHORT}
        state, updates = a_round(state)
        for client, update in updates.items():
            same(update.adapter.tensors(), by_hand(base, handed[client], ADAMW, shift=shifts[client]))
            said = update.memory
            kept[client] = {name: kept[client].get(name, 0.0) + change for name, change in said.items()}


def test_ffa_lora_trains_B_beside_a_frozen_A(base):
    start = a_state(base).adapter
    state = each_round_by_hand(base, ffa_lora(), ADAMW, 2)
    assert all(torch.equal(pair.A, start.pairs[path].A) for path, pair in state.adapter.pairs.items())


def test_rolora_trains_one_factor_a_round(base):
    each_round_by_hand(base, rolora(), ADAMW, 3)


@pytest.mark.parametrize("start", ["gradient", "base"])
def test_fed_sb_trains_the_weights_and_then_cores_between_frozen_frames(base, start):
    state = each_round_by_hand(base, fed_sb(start), ADAMW, 3)
    assert all(pair.core is not None for pair in state.adapter.pairs.values())


def test_slora_trains_masked_values_that_weight_decay_leaves_inside_the_mask(base):
    before = {path: base.get_submodule(path).weight.clone() for path in small.sites(base)}
    state = each_round_by_hand(base, slora(fedavg(), 2, 0.1, "keep"), ADAMW, 3)
    assert state.adapter.pairs.keys() == state.side.pairs.keys() == before.keys()
    for path, weight in before.items():
        layer = base.get_submodule(path)
        assert torch.equal(getattr(layer, "layer", layer).weight, weight)


def test_fedsa_clients_go_on_with_a_B_of_their_own(base):
    method, first = fedsa(), a_state(base)
    state, a_round = first, by_engine(base, method, ADAMW)
    own = {client: {n: t for n, t in first.adapter.tensors().items() if method.private(n)} for client in COHORT}
    for _ in range(3):
        handed = {client: method.assign(state, client, ADAMW.lr) for client in COHORT}
        after, updates = a_round(state)
        for client, update in updates.items():
            mine = replace(handed[client], adapter=handed[client].adapter.holding(own[client]))
            learned = by_hand(base, mine, ADAMW)
            same(
                {n: t for n, t in update.adapter.tensors().items() if n not in update.unsent},
                {n: t for n, t in learned.items() if not method.private(n)},
            )
            assert all(torch.equal(update.adapter.tensors()[n], first.adapter.tensors()[n]) for n in update.unsent)
            own[client] = {n: t for n, t in learned.items() if method.private(n)}
        state = after


def test_a_penalty_looks_back_at_what_the_client_itself_started_from(base):
    starts: list[Tensors] = []

    def watching(factors: Factors) -> Tensor:
        starts.append({name: t.detach().clone() for name, t in factors.start.items()})
        return torch.stack([t.flatten(1).sum(1) for t in factors.now.values()]).sum(0)

    engine = small.cohort_engine(
        base, SGD, rule=LocalRule(penalty=watching), private=is_B, seed=SEED, tokens=TOKENS
    )  # fmt: skip
    state = a_state(base)
    list(engine.train([Assignment("ann", 0, state.adapter, 0.05)]))
    kept = engine.store.get("ann", 1)
    starts.clear()
    list(engine.train([Assignment("ann", 1, state.adapter, 0.05, last=1)]))
    B = next(name for name in starts[0] if is_B(name))
    assert torch.equal(starts[0][B][0], kept[f"own/{B}"])
    assert not torch.equal(starts[0][B][0], state.adapter.tensors()[B])
