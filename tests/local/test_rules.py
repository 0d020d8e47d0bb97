"""Local rules, against one client trained by hand: weights that change in plain sight, and steps written out.

Nothing is shared with the engines but the rows of each step: the base is called with W + s B R A in the place of W, and
AdamW and SGD are their formulas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sheepfold.adapter import Adapter, kind
from sheepfold.config import TrainSettings
from sheepfold.errors import ConfigError
from sheepfold.local.rules import (
    RULES,
    Factors,
    LocalRule,
    Trained,
    each_tensor,
    finished,
    local_rule,
    proximal,
    together,
)
from sheepfold.local.steps import step_rows
from sheepfold.messages import Assignment, Update
from tests import small

SEED = 1
ADAMW = TrainSettings(steps=4, batch_rows=4, lr=2e-3, weight_decay=0.1, grad_norm=0.5)
SGD = TrainSettings(steps=4, batch_rows=4, lr=0.05, weight_decay=0.0, optimizer="sgd", grad_norm=0.5)
EXACT = 1e-10
TOKENS, ROWS = small.tokens(), small.client_rows()
Tensors = Mapping[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with small.one_thread():
        yield


@dataclass
class ByHand:
    """One client's local training, written out."""

    base: torch.nn.Module
    assignment: Assignment
    train: TrainSettings
    penalty: Callable[[Tensors], Tensor] = lambda now: torch.zeros(())
    correction: Tensors = field(default_factory=dict)
    clipped: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        a = self.assignment
        tensors = a.adapter.tensors()
        self.fixed = {n: t for n, t in tensors.items() if kind(n) in a.frozen or not t.is_floating_point()}
        self.now = {n: t.clone().requires_grad_() for n, t in tensors.items() if n not in self.fixed}
        self.moments = {n: (torch.zeros_like(t), torch.zeros_like(t)) for n, t in self.now.items()}

    def trained(self) -> Adapter:
        """Return what the client has after its steps."""
        for step in range(self.train.steps):
            self.step(step)
        return self.assignment.adapter.holding({n: t.detach() for n, t in self.now.items()})

    def weights(self) -> dict[str, Tensor]:
        """Return every weight that the client has changed."""
        a, held = self.assignment.adapter, self.fixed | self.now
        changed = {}
        for path, pair in a.pairs.items():
            B = held[f"{path}/B"] if pair.core is None else held[f"{path}/B"] @ held[f"{path}/core"]
            changed[path] = pair.scale * B @ held[f"{path}/A"]
        for path, delta in a.sparse.items():
            rows, columns = delta.positions // delta.shape[1], delta.positions % delta.shape[1]
            empty = torch.zeros(delta.shape, dtype=torch.float64)
            changed[path] = empty.index_put((rows, columns), held[f"{path}/values"])
        return {f"{path}.weight": self.base.get_submodule(path).weight + c for path, c in changed.items()}

    def loss(self, numbers) -> Tensor:
        """Return the mean over the rows' target tokens, each row by itself and without padding."""
        nats, count = torch.zeros((), dtype=torch.float64), 0
        for n in numbers:
            ids, labels = TOKENS.row(int(n))
            logits = torch.func.functional_call(self.base, self.weights(), (ids[None],)).logits[0]
            nats = nats + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        return nats / count

    def step(self, step: int) -> None:
        a, train = self.assignment, self.train
        numbers = step_rows(SEED, a.client, ROWS[a.client], train.batch_rows, a.first_step + step)
        total = self.loss(numbers) + self.penalty(self.now)
        gradients = dict(zip(self.now, torch.autograd.grad(total, list(self.now.values())), strict=True))
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        share = min(1.0, train.grad_norm / (norm + 1e-6))
        self.clipped.append({n: share * g for n, g in gradients.items()})
        for name, g in self.clipped[-1].items():
            self.move(name, g + self.correction.get(name, 0.0), step + 1)

    @torch.no_grad()
    def move(self, name: str, g: Tensor, t: int) -> None:
        """Take SGD's step, or AdamW's (arXiv:1711.05101, Algorithm 2)."""
        w, lr, (m, v) = self.now[name], self.assignment.lr, self.moments[name]
        if self.train.optimizer == "sgd":
            w.sub_(lr * g)
            return
        w.mul_(1 - lr * self.train.weight_decay)
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g * g)
        w.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))

    def mean_gradient(self) -> dict[str, Tensor]:
        """Return the mean of the clipped gradients."""
        return {n: torch.stack([g[n] for g in self.clipped]).mean(0) for n in self.now}


def by_engines(work: list[Assignment], train: TrainSettings, rule: LocalRule | None = None) -> list[dict[str, Update]]:
    """Return the updates of the cohort engine and of the reference engine."""
    made = []
    for make, over in ((small.cohort_engine, {}), (small.peft_engine, {"beyond_peft": True})):
        engine = make(small.model(), train, seed=SEED, rule=rule, **over)
        made.append({u.client: u for u in engine.train(work)})
        engine.close()
    return made


def handed(adapters: Mapping[str, Adapter], train: TrainSettings, **over) -> list[Assignment]:
    return [replace(a, **over) for a in small.assignments(dict(adapters), lr=train.lr)]


def pairs(base) -> dict[str, Adapter]:
    return {"ann": small.adapter(base, 2, 0), "cleo": small.adapter(base, 4, 1)}


def cores(base) -> dict[str, Adapter]:
    return {client: small.with_cores(a, seed) for seed, (client, a) in enumerate(pairs(base).items())}


def values(base) -> dict[str, Adapter]:
    return {client: small.sparse(base, 0.05, seed) for seed, client in enumerate(pairs(base))}


STARTS: Mapping[str, tuple[Callable, set[str]]] = {
    "lora": (pairs, set()),
    "ffa": (pairs, {"A"}),
    "rolora": (pairs, {"B"}),
    "fed_sb": (cores, {"A", "B"}),
    "slora": (values, set()),
}


@pytest.mark.parametrize("method", STARTS)
def test_both_engines_train_what_a_client_by_hand_trains(method):
    base, train = small.model(), ADAMW  # by SGD: see the next test
    make, frozen = STARTS[method]
    work = handed(make(base), train, frozen=frozenset(frozen))
    for updates in by_engines(work, train):
        for a in work:
            expected = ByHand(base, a, train).trained()
            assert small.gap(updates[a.client].adapter, expected) < EXACT
            assert small.gap(expected, a.adapter) > 1e-4


@pytest.mark.parametrize("method", STARTS)
def test_corrections_and_mean_gradients_are_those_by_hand(method):
    """The gradient is clipped, counted, and then corrected: SCAFFOLD's option II with a bound on what is counted."""
    base = small.model()
    make, frozen = STARTS[method]
    work = handed(make(base), SGD, frozen=frozenset(frozen), first_step=2)

    def correction(assignment: Assignment, own: Tensors) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(len(assignment.client))
        trained = ByHand(base, assignment, SGD).now
        return {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) / 5 for n, t in trained.items()}

    rule = LocalRule(correction=correction, mean_gradient=True, finish=lambda a, t: replace(t, send=t.mean_gradient))
    for updates in by_engines(work, SGD, rule):
        for a in work:
            hand = ByHand(base, a, SGD, correction=correction(a, {}))
            assert small.gap(updates[a.client].adapter, hand.trained()) < EXACT
            told, expected = updates[a.client].memory, hand.mean_gradient()
            assert told.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(told[name], gradient, rtol=0, atol=EXACT)
            plus = {n: (a.adapter.tensors()[n] - t) / (4 * SGD.lr) for n, t in hand.now.items()}
            for name, gradient in expected.items():  # (x - y) / (steps lr) is the mean of gradient plus correction
                torch.testing.assert_close(plus[name].detach(), gradient + hand.correction[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", STARTS)
def test_proximal_is_its_equation_by_hand(method):
    base, mu = small.model(), 2.5
    make, frozen = STARTS[method]
    work = handed(make(base), ADAMW, frozen=frozenset(frozen))
    for updates in by_engines(work, ADAMW, local_rule("proximal", {"mu": mu})):
        for a in work:
            start = a.adapter.tensors()

            def distance(now: Tensors, start: Tensors = start) -> Tensor:
                return mu / 2 * sum((t - start[n]).square().sum() for n, t in now.items())

            assert small.gap(updates[a.client].adapter, ByHand(base, a, ADAMW, penalty=distance).trained()) < EXACT


def test_a_penalty_of_pairs_is_its_equation_by_hand():
    """One that looks at whole products, and weighs them by each client's own rank."""
    base = small.model()
    work = handed(pairs(base), ADAMW)

    def sizes(factors: Factors) -> Tensor:
        products = {p: factors.now[f"{p}/B"] @ factors.now[f"{p}/A"] for p in factors.ranks}
        return torch.stack([m.square().sum((1, 2)) / factors.ranks[p] for p, m in products.items()]).sum(0)

    for updates in by_engines(work, ADAMW, LocalRule(penalty=sizes)):
        for a in work:
            rank = {path: pair.rank for path, pair in a.adapter.pairs.items()}

            def size(now: Tensors, rank: Mapping[str, int] = rank) -> Tensor:
                return sum(((now[f"{p}/B"] @ now[f"{p}/A"]) ** 2).sum() / r for p, r in rank.items())

            assert small.gap(updates[a.client].adapter, ByHand(base, a, ADAMW, penalty=size).trained()) < EXACT


@pytest.mark.parametrize("grad_norm", [None, 1e6])
def test_without_a_bound_that_binds_the_mean_gradient_is_the_gradient(grad_norm):
    base = small.model()
    train = SGD.model_copy(update={"steps": 1, "grad_norm": grad_norm})
    [a] = handed({"ann": small.adapter(base, 2, 0)}, train)
    rule = LocalRule(mean_gradient=True, finish=lambda a, t: replace(t, send=t.mean_gradient))
    hand = ByHand(base, a, train.model_copy(update={"grad_norm": 1e6}))
    hand.trained()
    for updates in by_engines([a], train, rule):
        for name, gradient in hand.mean_gradient().items():
            torch.testing.assert_close(updates["ann"].memory[name], gradient, rtol=0, atol=EXACT)


def test_a_step_that_was_skipped_counts_in_no_mean():
    """A row whose loss is not a number costs the step; the mean is over the good ones."""
    base = small.model()
    poison = small.VOCABULARY - 1
    rows = small.tokens()
    ids = rows.ids.copy()
    ids[ids == poison] = 3
    ids[rows.offsets[ROWS["ann"][2]]] = poison
    rows = type(rows)(ids, rows.is_target, rows.offsets, rows.prompt_tokens, rows.cut)
    train = SGD.model_copy(update={"steps": None, "epochs": 1})
    rule = LocalRule(mean_gradient=True, finish=lambda a, t: replace(t, send=t.mean_gradient))
    told = []
    for make in (small.cohort_engine, small.peft_engine):
        base = small.model()
        base.model.embed_tokens.weight[poison] = torch.nan
        engine = make(base, train, tokens=rows, rule=rule)
        updates = {u.client: u for u in engine.train(handed(pairs(base), train))}
        engine.close()
        assert updates["ann"].measurements.skipped_steps == 1
        moved = updates["ann"].adapter.tensors()
        start = pairs(small.model())["ann"].tensors()
        for name, gradient in updates["ann"].memory.items():  # SGD: what moved is lr times the sum over good steps
            torch.testing.assert_close((start[name] - moved[name]) / (3 * SGD.lr), gradient, rtol=0, atol=1e-8)
        told.append(updates["ann"].memory)
    for name, gradient in told[0].items():
        torch.testing.assert_close(gradient, told[1][name], rtol=0, atol=EXACT)


def factors_of(seed: int, clients: int, shape=(3, 4)) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    now, start = (
        {n: torch.randn(clients, *shape, generator=draw, dtype=torch.float64) for n in ("q/A", "q/B")} for _ in range(2)
    )
    return Factors(now, start, {"q": torch.tensor([3] * clients)})


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 5), st.floats(0, 10))
def test_a_penalty_over_a_cohort_is_each_clients_own(seed, clients, mu):
    factors = factors_of(seed, clients)
    penalty = each_tensor(partial(proximal, mu=mu))
    whole = penalty(factors)
    assert whole.shape == (clients,)
    for k in range(clients):
        one = Factors(
            {n: t[k : k + 1] for n, t in factors.now.items()}, {n: t[k : k + 1] for n, t in factors.start.items()}, {}
        )
        expected = mu / 2 * sum(((factors.now[n][k] - factors.start[n][k]) ** 2).sum() for n in factors.now)
        torch.testing.assert_close(penalty(one)[0], whole[k])
        torch.testing.assert_close(whole[k], torch.as_tensor(expected, dtype=torch.float64))


def test_two_rules_together_add_their_penalties_and_keep_the_rest():
    factors = factors_of(0, 2)
    near = LocalRule(penalty=each_tensor(partial(proximal, mu=1.0)))
    far = LocalRule(penalty=lambda f: f.now["q/A"].sum((1, 2)), mean_gradient=True, finish=lambda a, t: t)
    both = together(near, far)
    torch.testing.assert_close(both.penalty(factors), near.penalty(factors) + far.penalty(factors))
    assert (both.mean_gradient, both.finish, both.correction) == (True, far.finish, None)
    assert together(near, LocalRule()).penalty is near.penalty
    assert together(LocalRule(), near).penalty is near.penalty
    assert together(LocalRule(), LocalRule()) == LocalRule()
    correcting = LocalRule(correction=lambda a, own: {})
    assert together(far, correcting).correction is together(correcting, far).correction is correcting.correction
    for part, rule in (("finish", far), ("correction", correcting)):
        with pytest.raises(ConfigError, match=f"two local rules with a {part} of their own cannot run together"):
            together(rule, rule)


def test_a_result_that_no_rule_finishes_is_the_result():
    trained = Trained(Adapter(), {"x": torch.ones(1)})
    assignment = Assignment("ann", 0, Adapter(), 1e-3)
    assert finished(None, assignment, trained) is trained
    assert finished(LocalRule(), assignment, trained) is trained
    other = replace(trained, send={"y": torch.ones(2)})
    assert finished(LocalRule(finish=lambda a, t: other), assignment, trained) is other


def damped(local: Tensor, start: Tensor, share: float = 0.5) -> Tensor:
    """A rule of one's own, named as tests.local.test_rules:damped."""
    return share * proximal(local, start, 1.0)


def test_rules_are_found_by_name_with_their_arguments_fixed():
    assert sorted(RULES) == ["proximal"]
    factors = factors_of(1, 3)
    half = local_rule("tests.local.test_rules:damped", {})
    torch.testing.assert_close(half.penalty(factors), local_rule("proximal", {"mu": 0.5}).penalty(factors))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("proximall", {"mu": 1}, "did you mean 'proximal'"),
        ("proximal", {}, "missing a required argument: 'mu'"),
        ("proximal", {"mu": 1, "nu": 2}, "got an unexpected keyword argument 'nu'"),
        ("tests.local.test_rules:dampedd", {}, "has no 'dampedd'"),
    ],
)
def test_what_a_rule_cannot_take_is_one_line(name, arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        local_rule(name, arguments)
    assert "\n" not in str(raised.value)
