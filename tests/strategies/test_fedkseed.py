"""FedKSeed: seeds and scalars travel, and from them server and clients make the same weights, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from sheepfold import seeded
from sheepfold import state as states
from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.engines.seed_carrier import SEEDS, SeedCarrier
from sheepfold.engines.zeroth_order import CANDIDATES, SCALARS, ZerothOrderEngine
from sheepfold.errors import AdapterMismatch
from sheepfold.messages import Assignment, Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.state import BatchPlan, ServerState, Setting
from sheepfold.strategies.fedkseed import SIZES, USES, drawn, fedkseed, likelihoods
from tests import small

K = 12
METHODS = {"uniform": fedkseed(), "pro": fedkseed(probabilities=True)}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.one_thread():
        yield


def a_start(method=METHODS["uniform"], candidates: int = K, steps: int = 3) -> ServerState:
    setting = Setting(seed=5, clients=tuple(small.CLIENTS), steps=steps)
    fresh = Adapter(extra={SEEDS: torch.zeros(candidates)})
    return method.begin(ServerState(0, fresh, BatchPlan(1, 4, 1000), setting=setting))


def an_update(client: str, candidates, scalars, rows: int = 10) -> Update:
    memory = {CANDIDATES: torch.tensor(candidates, dtype=torch.int16), SCALARS: torch.tensor(scalars)}
    steps = len(candidates)
    measured = Measurements(Mean(1.0, 1.0), rows, rows * 7, rows * 3, rows * 30, steps)
    return Update(client, Adapter(), measured, memory, frozenset({f"{SEEDS}/extra"}))


step = st.tuples(st.integers(0, K - 1), st.floats(-1e3, 1e3, width=32))
cohort = st.lists(st.tuples(st.integers(1, 100), st.lists(step, min_size=1, max_size=6)), min_size=1, max_size=4)


@given(cohort, st.sampled_from(["rows", "uniform"]))
def test_the_fold_is_the_weighted_mean_of_the_clients_sums(cohort, weights):
    method, state, expected = fedkseed(weights=weights), a_start(), np.zeros(K)
    updates = [an_update(f"c{i}", *zip(*steps, strict=True), rows=rows) for i, (rows, steps) in enumerate(cohort)]
    p = np.array([rows if weights == "rows" else 1 for rows, _ in cohort], dtype=float)
    for share, (_, steps) in zip(p / p.sum(), cohort, strict=True):
        for s, g in steps:
            expected[s] += share * g
    state = method.fold(state, iter(updates))
    np.testing.assert_allclose(state.adapter.extra[SEEDS].numpy(), expected, rtol=1e-6, atol=1e-3)
    again = method.fold(state, iter(updates))
    np.testing.assert_allclose(again.adapter.extra[SEEDS].numpy(), 2 * expected, rtol=1e-6, atol=1e-3)
    assert again.round == 2


@given(cohort, st.floats(0.1, 100))
def test_pros_likelihoods_are_the_softmax_of_mean_sizes_between_0_and_1(cohort, clip):
    method = fedkseed(probabilities=True, clip=clip)
    state, history = a_start(method), [[0.0] for _ in range(K)]
    for _ in range(2):
        updates = [an_update(f"c{i}", *zip(*steps, strict=True)) for i, (_, steps) in enumerate(cohort)]
        state = method.fold(state, updates)
        for s, g in (step for _, steps in cohort for step in steps):
            history[s].append(min(abs(g), clip))
    size = np.array([np.mean(own) for own in history])
    spread = np.ptp(size)
    scaled = (size - size.min()) / spread if spread else np.zeros(K)
    expected = np.exp(scaled) / np.exp(scaled).sum()
    np.testing.assert_allclose(likelihoods(state.memory[USES], state.memory[SIZES]).numpy(), expected, rtol=1e-9)


def test_pro_draws_what_moved_the_loss_more_often_and_anew_for_each_client_and_round():
    method = METHODS["pro"]
    state = a_start(method, steps=4000)
    state = method.fold(state, [an_update("ann", list(range(K)), [float(s) for s in range(K)])])
    found = np.bincount(drawn(state, "ann").numpy(), minlength=K) / 4000
    expected = likelihoods(state.memory[USES], state.memory[SIZES]).numpy()
    assert expected[-1] / expected[0] == pytest.approx(np.e)
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(expected.max() / 4000))
    handed = method.assign(state, "ann", 1.0).memory[CANDIDATES]
    assert torch.equal(handed, drawn(state, "ann"))
    assert not torch.equal(handed, drawn(state, "bob"))
    assert not torch.equal(handed, drawn(replace(state, round=9), "ann"))


@pytest.mark.parametrize("name", METHODS)
def test_a_client_and_round_take_less_than_20_kb(name):
    method = METHODS[name]
    state = a_start(method, candidates=4096, steps=200)
    handed = method.assign(state, "ann", 1.0)
    memory = {CANDIDATES: torch.zeros(200, dtype=torch.int16), SCALARS: torch.zeros(200)}
    back = replace(an_update("ann", [0], [0.0]), memory=memory)
    down, up = len(save({**handed.adapter.tensors(), **handed.memory})), len(save(dict(back.memory)))
    assert 0 < down - handed.nbytes < 300  # a safetensors file's head
    assert 0 < up - back.nbytes < 300
    assert handed.nbytes + back.nbytes == 4096 * 4 + 200 * 6 + (400 if name == "pro" else 0) <= 18_000
    assert down + up < 20_000


class Machine:
    """A client's own machine: a model of its own, and nothing of the server's but what comes as bytes."""

    def __init__(self, client: str, dtype: torch.dtype) -> None:
        self.client, train = client, TrainSettings(steps=3, batch_rows=4, lr=1e-2, optimizer="sgd", grad_norm=None)
        settings = AdapterSettings(method="seeds", options={"candidates": K, "eps": 1e-2})
        rows = {client: small.client_rows()[client]}
        plan = BatchPlan(1, 4, 1000)
        base = small.model(dtype)
        self.engine = ZerothOrderEngine(base, small.tokens(), rows, train, settings, seed=5, plan=plan)

    def answer(
        self, round: int, content: bytes, first_step: int
    ) -> tuple[bytes, dict[str, torch.Tensor], Measurements]:
        """Return what goes back, and the weights that the round began with."""
        tensors = load(content)
        adapter = Adapter(extra={SEEDS: tensors.pop(f"{SEEDS}/extra")})
        self.engine.weights.write(adapter)
        began = {name: p.clone() for name, p in self.engine.weights.model.named_parameters()}
        (update,) = self.engine.train([Assignment(self.client, round, adapter, 1e-2, first_step, tensors)])
        assert isinstance(update, Update)
        assert update.unsent == set(update.adapter.tensors())
        return save(dict(update.memory)), began, update.measurements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_server_and_clients_have_the_same_bits_at_the_start_of_every_round(name, dtype, monkeypatch):
    method = METHODS[name]
    state, drawn_steps = a_start(method), dict.fromkeys(small.CLIENTS, 0)
    machines = {client: Machine(client, dtype) for client in small.CLIENTS}
    server = SeedCarrier(small.model(dtype), K, 1e-2, 5)
    cohorts = (("ann", "cleo"), ("bob", "cleo"), ("ann", "dora"), ("bob", "ann"))  # nobody is there every time
    for cohort in cohorts:
        with monkeypatch.context() as other:
            other.setattr(seeded, "chunk", lambda device: 1000)  # as on another kind of machine
            server.write(state.adapter)
        ours = dict(server.model.named_parameters())
        updates = []
        for client in cohort:
            handed = method.assign(state, client, 1e-2)
            content = save({**handed.adapter.tensors(), **handed.memory})
            back, theirs, measured = machines[client].answer(state.round, content, drawn_steps[client])
            drawn_steps[client] += 3
            assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
            updates.append(Update(client, Adapter(), measured, load(back)))
        state = method.fold(state, updates)
    assert state.round == 4
    moved = [not torch.equal(p, ours[n]) for n, p in small.model(dtype).named_parameters()]
    assert any(moved)
    assert dtype != torch.float32 or all(moved)


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {CANDIDATES: torch.tensor([1]), SCALARS: torch.tensor([1.0, 2.0])},
        {CANDIDATES: torch.tensor([K]), SCALARS: torch.tensor([1.0])},
        {CANDIDATES: torch.tensor([-1]), SCALARS: torch.tensor([1.0])},
        {CANDIDATES: torch.tensor([1]), SCALARS: torch.tensor([float("inf")])},
        {CANDIDATES: torch.tensor([1]), SCALARS: torch.tensor([float("nan")])},
    ],
)
def test_an_update_that_is_no_step_each_is_refused(memory):
    odd = replace(an_update("ann", [0], [0.0]), memory=memory)
    with pytest.raises(AdapterMismatch, match="round 1, client 'ann': expected a candidate, 0 to 11"):
        METHODS["uniform"].fold(a_start(), [odd])


def test_weights_of_zero_have_no_mean():
    with pytest.raises(AdapterMismatch, match="the weights sum to 0"):
        METHODS["uniform"].fold(a_start(), [an_update("ann", [0], [1.0], rows=0)])


def test_the_state_keeps_pros_memory(tmp_path):
    method = METHODS["pro"]
    state = method.fold(a_start(method), [an_update("ann", [1, 1], [2.0, -3.0])])
    states.save(state, tmp_path / "state")
    read = states.load(tmp_path / "state", state.setting)
    assert read.memory[USES].tolist() == state.memory[USES].tolist() == [0, 2, *[0] * (K - 2)]
    assert read.memory[SIZES][1] == 5.0
    assert torch.equal(drawn(read, "bob"), drawn(state, "bob"))
