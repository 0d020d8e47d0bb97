"""The engine of adapter.method seeds: MeZO's step over all weights, and nothing that drifts."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.func import functional_call

from sheepfold import seeded
from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.engines.seed_carrier import SEEDS, SeedCarrier
from sheepfold.engines.zeroth_order import CANDIDATES, SCALARS, ZerothOrderEngine
from sheepfold.errors import AdapterMismatch, ModelError
from sheepfold.local.steps import step_rows
from sheepfold.messages import Absence, Assignment
from sheepfold.state import BatchPlan
from sheepfold.tasks.causal_lm import CAUSAL_LM
from tests import encoders, small

TRAIN = TrainSettings(steps=4, batch_rows=4, lr=1e-3, grad_norm=None, optimizer="sgd")
K, EPS, SEED = 16, 1e-3, 1


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with small.one_thread():
        yield


def an_engine(base, train=TRAIN, tokens=None, task=CAUSAL_LM, plan=None, rows=None) -> ZerothOrderEngine:
    settings = AdapterSettings(method="seeds", options={"candidates": K, "eps": EPS})
    return ZerothOrderEngine(
        base, tokens or small.tokens(), rows or small.client_rows(), train, settings,
        seed=SEED, plan=plan or BatchPlan(1, train.micro_rows or train.batch_rows, 1000), task=task,
    )  # fmt: skip


def sums(seed: int = 0, share: float = 0.5) -> Adapter:
    """Return sums of scalars, some of them zero."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(extra={SEEDS: torch.randn(K, generator=draw) * (torch.rand(K, generator=draw) < share)})


def directions(base, candidate: int) -> dict[str, torch.Tensor]:
    """Return a direction by parameter, in float64: elements count over sorted names."""
    shapes = {name: p.shape for name, p in sorted(base.named_parameters())}
    ends = np.cumsum([0, *(s.numel() for s in shapes.values())])
    z = seeded.normals(seeded.keys(SEED, K)[candidate : candidate + 1], 0, int(ends[-1]))[0].double()
    return {name: z[a:b].view(shapes[name]) for name, (a, b) in zip(shapes, pairwise(ends.tolist()), strict=True)}


def walked(base, G, lr) -> dict[str, torch.Tensor]:
    """Return w0 - lr sum_s G_s z_s in float64, dense."""
    weights = {name: p.detach().double().clone() for name, p in base.named_parameters()}
    for s in range(K):
        for name, z in directions(base, s).items():
            weights[name] -= lr * float(G[s]) * z
    return weights


def oracle(base, start: Adapter, candidates, train, first=0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the scalars and the weights of ann's round, dense and in float64."""
    rows, tokens, weights = small.client_rows()["ann"], small.tokens(), walked(base, start.extra[SEEDS], train.lr)
    scalars = []
    for step, s in enumerate(candidates.tolist()):
        z = directions(base, s)

        def loss(amount: float, step=step, z=z, weights=weights) -> float:
            there = {name: w + amount * z[name] for name, w in weights.items()}
            nats, targets = 0.0, 0
            for n in step_rows(SEED, "ann", rows, train.batch_rows, first + step):
                ids, labels = tokens.row(int(n))
                logits = functional_call(base, there, (ids[None],)).logits[0, :-1]
                nats += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
                targets += int((labels[1:] >= 0).sum())
            return nats / targets

        g = (loss(EPS) - loss(-EPS)) / (2 * EPS)
        if train.grad_norm is not None:
            g = float(np.clip(g, -train.grad_norm, train.grad_norm))
        scalars.append(g)
        weights = {name: w - train.lr * g * z[name] for name, w in weights.items()}
    return scalars, weights


@pytest.mark.parametrize("bound", [None, 0.05])
def test_a_round_is_mezos_steps_done_densely_in_float64(bound):
    train = TRAIN.model_copy(update={"grad_norm": bound})
    engine, start = an_engine(small.model(), train), sums()
    (update,) = engine.train([Assignment("ann", 0, start, train.lr, first_step=3)])
    candidates = update.memory[CANDIDATES]
    scalars, _ = oracle(small.model(), start, candidates, train, first=3)
    np.testing.assert_allclose(update.memory[SCALARS].numpy(), scalars, rtol=1e-5, atol=1e-8)
    if bound:
        assert max(map(abs, scalars)) == bound
    moved = start.extra[SEEDS].double().numpy()
    np.add.at(moved, candidates.numpy(), scalars)
    np.testing.assert_allclose(update.adapter.extra[SEEDS].numpy(), moved, rtol=1e-5, atol=1e-7)
    assert update.unsent == set(update.adapter.tensors())
    assert update.nbytes == 4 * (2 + 4)


def test_steps_walk_from_where_the_last_one_ended():
    engine, start = an_engine(small.model()), sums()
    (update,) = engine.train([Assignment("ann", 0, start, TRAIN.lr)])
    _, expected = oracle(small.model(), start, update.memory[CANDIDATES], TRAIN)
    engine.weights.write(update.adapter)
    for name, p in engine.weights.model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_the_base_and_its_directions_rounded_once(dtype):
    base, G = small.model(dtype), sums().extra[SEEDS]
    expected = walked(base, G, TRAIN.lr)
    carrier = SeedCarrier(base, K, TRAIN.lr, SEED)
    carrier.write(Adapter(extra={SEEDS: G}))
    assert carrier.weights(carrier.read()).dtype == torch.float32
    for name, p in base.named_parameters():
        gap = (p.double() - expected[name]).abs()
        assert bool((gap <= torch.finfo(dtype).eps / 2 * expected[name].abs() + 1e-6).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_along_directions_leaves_the_weights_as_they_were_to_the_bit(dtype):
    engine, start = an_engine(small.model(dtype)), sums()
    carrier = engine.weights
    weights = carrier.weights(start).clone()
    for s in range(K):
        for amount in (EPS, -EPS):
            carrier.perturb(weights, s, amount)
    assert torch.equal(weights, carrier.weights(start))
    carrier.write(start)
    before = [p.clone() for p in carrier.model.parameters()]
    list(engine.train([Assignment("ann", 0, start, TRAIN.lr)]))
    carrier.write(start)
    assert all(torch.equal(a, b) for a, b in zip(before, carrier.model.parameters(), strict=True))


def test_without_scalars_the_model_is_the_base():
    base = small.model(torch.bfloat16)
    before = {name: p.clone() for name, p in base.named_parameters()}
    engine = an_engine(base)
    engine.weights.write(sums())
    engine.weights.write(Adapter(extra={SEEDS: torch.zeros(K)}))
    assert all(torch.equal(before[name], p) for name, p in base.named_parameters())


def test_tied_weights_move_once_and_together():
    base = small.model(torch.float32, tie_word_embeddings=True)
    untied = small.model(torch.float32)
    tied = base.get_output_embeddings().weight
    assert len(SeedCarrier(untied, K, 1.0, SEED)) - len(SeedCarrier(base, K, 1.0, SEED)) == tied.numel()
    carrier = SeedCarrier(base, K, TRAIN.lr, SEED)
    carrier.write(sums())
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert torch.equal(tied, base.get_input_embeddings().weight)


def test_a_classifiers_head_trains_with_the_rest():
    base = encoders.model()
    engine = an_engine(base, tokens=encoders.tokens(), task=encoders.TASK)
    (update,) = engine.train([Assignment("ann", 0, engine.initial(), TRAIN.lr)])
    before = {name: p.clone() for name, p in encoders.model().named_parameters()}
    engine.weights.write(update.adapter)
    assert all(not torch.equal(before[name], p) for name, p in base.named_parameters())
    loss, table = (lambda s: (s.loss, s.confusion))(engine.scores([update.adapter], [(0, np.arange(10))], 4)[0])
    assert table.sum() == loss.count == 10


def test_smaller_forward_passes_change_no_scalar():
    work = [Assignment("ann", 0, sums(), TRAIN.lr)]
    whole, parts = an_engine(small.model()), an_engine(small.model(), plan=BatchPlan(1, 1, 1000))
    (a,), (b,) = whole.train(work), parts.train(work)
    torch.testing.assert_close(a.memory[SCALARS], b.memory[SCALARS], rtol=1e-5, atol=1e-7)


def test_the_servers_candidates_come_first_and_own_ones_after():
    engine, given = an_engine(small.model()), torch.tensor([3, 3], dtype=torch.int16)
    work = [Assignment("ann", r, sums(), TRAIN.lr, memory=m) for r, m in ((0, {}), (0, {CANDIDATES: given}), (1, {}))]
    own, mixed, later = (update.memory[CANDIDATES].tolist() for update in engine.train(work))
    assert mixed == [3, 3, *own[2:]]
    assert own != later
    assert all(0 <= s < K for s in own + later)


def test_a_step_without_a_finite_loss_is_not_taken_and_says_so():
    base = small.model(torch.float32)
    engine = an_engine(base)
    broken = engine.task

    class Breaks:
        def __getattr__(self, name):
            return getattr(broken, name)

        calls = 0

        def predict(self, *args, **more):
            Breaks.calls += 1
            made = broken.predict(*args, **more)
            return replace(made, logits=made.logits * float("inf")) if Breaks.calls in (3, 4) else made

    engine.task = Breaks()
    (update,) = engine.train([Assignment("ann", 0, sums(), TRAIN.lr)])
    assert len(update.memory[SCALARS]) == len(update.memory[CANDIDATES]) == 3, "a step not taken does not travel"
    assert update.memory[SCALARS].isfinite().all()
    assert (update.measurements.skipped_steps, update.measurements.steps) == (1, 4)
    assert "overflow" in update.measurements.why_skipped
    assert update.adapter.is_finite()


def test_a_scalar_too_large_to_travel_is_not_taken():
    engine = an_engine(small.model(torch.float64))
    engine.eps, losses = 1e-3, iter([1e300, -1e300] * TRAIN.steps)
    engine._loss = lambda rows: next(losses)
    (answer,) = engine.train([Assignment("ann", 0, sums(), TRAIN.lr)])
    assert isinstance(answer, Absence)


def test_a_client_without_rows_stays_away():
    engine = an_engine(small.model(), rows={"ann": np.array([], dtype=np.int64)})
    (answer,) = engine.train([Assignment("ann", 0, sums(), TRAIN.lr)])
    assert isinstance(answer, Absence)


@pytest.mark.parametrize("odd", [{}, {SEEDS: torch.zeros(3)}, {"head": torch.zeros(K)}])
def test_another_adapter_is_refused(odd):
    with pytest.raises(AdapterMismatch, match="expected seeds alone, of 16 numbers"):
        SeedCarrier(small.model(), K, 1.0, SEED).write(Adapter(extra=odd))


def test_weights_that_are_not_in_one_piece_are_refused():
    base = small.model()
    base.lm_head.weight.data = base.lm_head.weight.data.T.contiguous().T
    with pytest.raises(ModelError, match="not in one piece"):
        SeedCarrier(base, K, 1.0, SEED)
