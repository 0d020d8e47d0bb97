"""What trains and what does not: frozen kinds, sides, cores, sparse deltas and client halves, in both engines.

The cohort engine trains all clients at once over a client axis, the reference engine each by itself through plain PEFT,
or through hooks where PEFT has no layer. They share neither the forward pass nor the step.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from sheepfold.adapter import Adapter, LoraPair, from_delta, kind
from sheepfold.config import TrainSettings
from sheepfold.engines.cohort_pass import Pass
from sheepfold.engines.stack import chains, stacked
from sheepfold.errors import AdapterMismatch
from sheepfold.local.rules import Factors, LocalRule, Trained, each_tensor, proximal, together
from sheepfold.messages import Assignment, Update
from sheepfold.state import BatchPlan
from tests import small

TRAIN = TrainSettings(epochs=1, batch_rows=4, lr=5e-3, schedule="linear", weight_decay=0.1)
"""4, 3, 4 and 5 steps for the four clients, AdamW, clipped to 1.0: clients leave early, at rates of their own."""
RANKS = {"ann": 2, "bob": 4, "cleo": 8, "dora": 4}
EXACT = 1e-10


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with small.one_thread():
        yield


def mixed(base, family="llama") -> dict[str, Adapter]:
    """Return an adapter of its own rank for each client."""
    return {c: small.adapter(base, r, seed, family) for seed, (c, r) in enumerate(RANKS.items())}


def handed(adapters: Mapping[str, Adapter], **over) -> list[Assignment]:
    """Return the clients' assignments, with some fields of all of them replaced."""
    return [replace(a, **over) for a in small.assignments(dict(adapters), lr=TRAIN.lr)]


def alone(base, work, train=TRAIN, family="llama", **over) -> dict[str, Update]:
    """Return what the reference engine makes of the work, on a base that is its own afterwards."""
    return {u.client: u for u in small.peft_engine(base, train, family, **over).train(work)}


def in_a_cohort(base, work, train=TRAIN, family="llama", **over) -> dict[str, Update]:
    """Return what the cohort engine makes of the work."""
    engine = small.cohort_engine(base, train, family, **over)
    try:
        return {u.client: u for u in engine.train(work)}
    finally:
        engine.close()


def agree(base, work, family="llama", *, beyond_peft=False, **over) -> dict[str, Update]:
    """Assert that both engines return the same numbers, and that every client trained; return the cohort's updates."""
    ours = in_a_cohort(base, work, family=family, **over)
    theirs = alone(base, work, family=family, beyond_peft=beyond_peft, **over)
    for a in work:
        update, reference = ours[a.client], theirs[a.client]
        assert small.gap(update.adapter, reference.adapter) < EXACT
        assert small.gap(update.adapter, a.adapter) > 1e-3, "training must change the adapter, or nothing is compared"
        assert update.measurements.loss.value == pytest.approx(reference.measurements.loss.value, rel=1e-12)
        assert update.unsent == reference.unsent
        assert update.memory.keys() == reference.memory.keys()
        for name, tensor in update.memory.items():
            torch.testing.assert_close(tensor, reference.memory[name], rtol=0, atol=EXACT)
    assert len({u.measurements.steps for u in ours.values()}) > 2, "some clients must leave before others"
    return ours


def unmoved(update: Update, start: Adapter, kinds: set[str]) -> None:
    """Assert that these kinds have the bits they started with, and that all others moved."""
    before = start.tensors()
    for name, tensor in update.adapter.tensors().items():
        assert torch.equal(tensor, before[name]) == (kind(name) in kinds), name
        assert (name in update.unsent) == (kind(name) in kinds), name


@pytest.mark.parametrize("frozen", ["A", "B"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_frozen_factor_keeps_its_bits_in_both_engines_whatever_the_weight_decay(family, frozen):
    base = small.model(family=family)
    work = handed(mixed(base, family), frozen=frozenset({frozen}))
    for update, a in zip(agree(base, work, family).values(), work, strict=True):
        unmoved(update, a.adapter, {frozen})


def test_the_reference_engine_goes_from_one_frozen_factor_to_the_other_and_back():
    base = small.model()
    start = mixed(base)
    engine = small.peft_engine(base, TRAIN)
    for round, frozen in enumerate(({"A"}, {"B"}, set())):
        work = handed(start, frozen=frozenset(frozen), round=round)
        for update, a in zip(engine.train(work), work, strict=True):
            unmoved(update, a.adapter, frozen)
            start[update.client] = update.adapter


def test_a_factor_that_all_clients_share_is_stored_once_and_trains_as_copies_of_it_do():
    base = small.model()
    shared, own = small.adapter(base, 4, 0), small.adapter(base, 4, 1)
    pairs = {path: LoraPair(pair.A, own.pairs[path].B, pair.scale) for path, pair in shared.pairs.items()}
    once = {client: Adapter(pairs) for client in RANKS}
    copies = {client: a.holding({n: t.clone() for n, t in a.tensors().items()}) for client, a in once.items()}
    for frozen in (frozenset({"A"}), frozenset({"B"})):
        held = {
            name: stacked(list(adapters.values()), "cpu", grad=True, frozen=frozen).fixed
            for name, adapters in (("once", once), ("copies", copies))
        }
        assert {t.shape[0] for t in held["once"].values()} == {1}
        assert {t.shape[0] for t in held["copies"].values()} == {4}
        results = [in_a_cohort(base, handed(adapters, frozen=frozen)) for adapters in (once, copies)]
        for client in RANKS:
            assert small.gap(results[0][client].adapter, results[1][client].adapter) < 1e-12
        agree(small.model(), handed(once, frozen=frozen))


def a_side(base, rank, family="llama", *, every: bool = True) -> Adapter:
    """Return a change of the base of this rank, of every module or of the first and last alone."""
    drawn = small.adapter(base, rank, 9, family)
    paths = sorted(drawn.pairs) if every else sorted(drawn.pairs)[:: len(drawn.pairs) - 1]
    return Adapter({path: replace(drawn.pairs[path], scale=0.5) for path in paths})


def merged(family: str, side: Adapter):
    """Return the small base with the side added to its own weights."""
    base = small.model(family=family)
    for path, pair in side.pairs.items():
        weight = base.get_submodule(path).weight
        delta = pair.scale * pair.B @ pair.A
        weight.add_(delta if weight.shape == delta.shape and family != "gpt2" else delta.T)
    return base


@pytest.mark.parametrize(
    ("family", "rank", "matrices", "every"),
    [
        ("llama", 3, 2, True),
        ("llama", 3, 2, False),
        ("llama", 32, 1, True),
        ("gpt2", 3, 2, False),
        ("gpt2", 32, 1, True),
    ],
)
def test_a_side_trains_as_if_it_were_merged_into_the_base(family, rank, matrices, every):
    base = small.model(family=family)
    side = a_side(base, rank, family, every=every)
    assert {len(chain) for chain in chains(side, torch.device("cpu"), torch.float64).values()} == {matrices}
    start = mixed(base, family)
    with_side = agree(base, handed(start, side=side), family)
    into_base = in_a_cohort(merged(family, side), handed(start), family=family)
    without = in_a_cohort(small.model(family=family), handed(start), family=family)
    for client in RANKS:
        assert small.gap(with_side[client].adapter, into_base[client].adapter) < EXACT
        assert small.gap(with_side[client].adapter, without[client].adapter) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("frozen", [{"A", "B"}, set()])
def test_cores_train_in_both_engines_alike_alone_or_with_their_frames(family, frozen):
    base = small.model(family=family)
    start = {client: small.with_cores(a, seed) for seed, (client, a) in enumerate(mixed(base, family).items())}
    work = handed(start, frozen=frozenset(frozen))
    for update, a in zip(agree(base, work, family, beyond_peft=True).values(), work, strict=True):
        unmoved(update, a.adapter, frozen)


def test_cores_train_beside_a_side_and_between_frames_that_are_stored_once():
    base = small.model()
    frame = small.adapter(base, 4, 0)
    start = {c: Adapter(dict(small.with_cores(frame, seed).pairs)) for seed, c in enumerate(RANKS)}
    stack = stacked(list(start.values()), "cpu", grad=True, frozen={"A", "B"})
    assert {t.shape[0] for t in stack.fixed.values()} == {1}
    assert stack.flat.shape == (4, 6 * 4 * 4)
    agree(base, handed(start, frozen=frozenset({"A", "B"}), side=a_side(base, 3)), beyond_peft=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparse_deltas_train_at_their_positions_alone_in_both_engines(family):
    base = small.model(family=family)
    start = {client: small.sparse(base, 0.05, seed, family) for seed, client in enumerate(RANKS)}
    work = handed(start, side=a_side(base, 3, family, every=False))
    for update, a in zip(agree(base, work, family, beyond_peft=True).values(), work, strict=True):
        unmoved(update, a.adapter, {"positions"})
        for path, sparse in update.adapter.sparse.items():
            held = torch.zeros(sparse.shape[0] * sparse.shape[1], dtype=torch.bool)
            held[a.adapter.sparse[path].positions] = True
            assert not sparse.delta().view(-1)[~held].any(), "a weight outside the mask moved"


def test_clients_that_change_other_positions_are_refused():
    base = small.model()
    start = {client: small.sparse(base, 0.05, mask=seed) for seed, client in enumerate(RANKS)}
    with pytest.raises(AdapterMismatch, match="the cohort engine needs one mask"):
        in_a_cohort(base, handed(start))


def of_own_ranks(factors: Factors) -> Tensor:
    """A penalty of whole pairs that looks at each client's own rank: ||B_k A_k - B_0 A_0||^2 / r_k."""
    each = []
    for path, ranks in factors.ranks.items():
        now = factors.now.get(f"{path}/B", factors.start.get(f"{path}/B")) @ factors.now[f"{path}/A"]
        start = factors.start[f"{path}/B"] @ factors.start[f"{path}/A"]
        each.append((now - start).square().sum(dim=(1, 2)) / ranks)
    return 0.05 * torch.stack(each).sum(0)


def tails(factors: Factors) -> Tensor:
    """A penalty of the rows of A and columns of B beyond half of each client's own rank."""
    each = []
    for path, ranks in factors.ranks.items():
        A, B = factors.now[f"{path}/A"], factors.now[f"{path}/B"]
        rest = torch.arange(A.shape[1])[None] >= ranks[:, None] // 2
        each.append((A.square().sum(2) * rest).sum(1) * (B.square().sum(1) * rest).sum(1))
    return torch.stack(each).sum(0)


NEAR = LocalRule(penalty=each_tensor(partial(proximal, mu=3.0)))


@pytest.mark.parametrize(
    "rule", [NEAR, LocalRule(penalty=of_own_ranks), LocalRule(penalty=tails)], ids=["proximal", "pairs", "tails"]
)
def test_a_penalty_sees_each_client_at_its_own_rank(rule):
    base = small.model()
    work = handed(mixed(base), side=a_side(base, 3))
    ours = agree(base, work, rule=rule)
    without = in_a_cohort(small.model(), work)
    assert all(small.gap(ours[c].adapter, without[c].adapter) > 1e-4 for c in RANKS)


@pytest.mark.parametrize("kinds", [{"A"}, {"B"}])
def test_a_penalty_looks_at_what_trains_and_at_nothing_else(kinds):
    base = small.model()
    seen: list[set[str]] = []

    def watching(factors: Factors) -> Tensor:
        seen.append({kind(name) for name in factors.now} | {kind(name) for name in factors.start})
        return each_tensor(partial(proximal, mu=3.0))(factors)

    agree(base, handed(mixed(base), frozen=frozenset(kinds)), rule=LocalRule(penalty=watching))
    assert {frozenset(names) for names in seen} == {frozenset({"A", "B"} - kinds)}


def test_cores_and_sparse_values_feel_a_penalty_in_both_engines():
    base = small.model()
    cores = {client: small.with_cores(a, seed) for seed, (client, a) in enumerate(mixed(base).items())}
    values = {client: small.sparse(base, 0.05, seed) for seed, client in enumerate(RANKS)}
    for start, frozen in ((cores, frozenset({"A", "B"})), (values, frozenset())):
        ours = agree(small.model(), handed(start, frozen=frozen), beyond_peft=True, rule=NEAR)
        without = in_a_cohort(small.model(), handed(start, frozen=frozen))
        assert all(small.gap(ours[c].adapter, without[c].adapter) > 1e-4 for c in RANKS)


def variates(assignment: Assignment, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a correction of the client's own for everything of it that trains, large enough to matter."""
    draw = torch.Generator().manual_seed(len(assignment.client) + ord(assignment.client[0]))
    return {
        name: torch.randn(t.shape, generator=draw, dtype=torch.float64)
        for name, t in assignment.adapter.tensors().items()
        if kind(name) not in assignment.frozen and t.is_floating_point()
    }


def tell(assignment: Assignment, trained: Trained) -> Trained:
    """Send the mean gradient to the server."""
    return replace(trained, send=trained.mean_gradient)


SCAFFOLDED = LocalRule(correction=variates, mean_gradient=True, finish=tell)


@pytest.mark.parametrize("frozen", [set(), {"A"}])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_correction_goes_on_top_of_the_clipped_gradient_and_the_mean_gradient_leaves_it_out(optimizer, frozen):
    base = small.model()
    train = TRAIN.model_copy(update={"optimizer": optimizer, "grad_norm": 0.2})
    work = handed(mixed(base), frozen=frozenset(frozen))
    ours = agree(base, work, train=train, rule=SCAFFOLDED)
    for a in work:
        told = ours[a.client].memory
        trained = {name: t.shape for name, t in a.adapter.tensors().items() if kind(name) not in frozen}
        assert {name: t.shape for name, t in told.items()} == trained
        norm = torch.stack([t.norm() for t in told.values()]).norm()
        assert 0 < norm <= 0.2, "a mean of vectors of norm 0.2 at most"


@pytest.mark.parametrize("frozen", [set(), {"A", "B"}])
def test_cores_and_sparse_values_are_corrected_in_both_engines(frozen):
    base = small.model()
    if frozen:
        start = {client: small.with_cores(a, seed) for seed, (client, a) in enumerate(mixed(base).items())}
    else:
        start = {client: small.sparse(base, 0.05, seed) for seed, client in enumerate(RANKS)}
    agree(base, handed(start, frozen=frozenset(frozen)), beyond_peft=True, rule=SCAFFOLDED)


def test_everything_at_once_is_the_same_for_one_client_and_in_any_pass():
    base = small.model()
    rule = together(SCAFFOLDED, NEAR)
    work = handed(mixed(base), frozen=frozenset({"B"}), side=a_side(base, 3))
    results = [
        in_a_cohort(base, work, rule=rule, dropout=0.2, plan=plan)
        for plan in (BatchPlan(4, 2, 120), BatchPlan(1, 4, 10_000), BatchPlan(3, 1, 30))
    ]
    for other in results[1:]:
        for client in RANKS:
            assert small.gap(results[0][client].adapter, other[client].adapter) < EXACT
            for name, gradient in other[client].memory.items():
                torch.testing.assert_close(results[0][client].memory[name], gradient, rtol=0, atol=EXACT)
    agree(base, work, rule=rule)


def test_checkpointed_layers_recompute_chains_of_every_length():
    for start, frozen in (
        ({c: small.with_cores(a) for c, a in mixed(small.model()).items()}, {"A"}),
        (dict.fromkeys(RANKS, small.sparse(small.model(), 0.05)), set()),
    ):
        base = small.model()
        work = handed(start, frozen=frozenset(frozen), side=a_side(base, 3))
        plain = in_a_cohort(base, work, dropout=0.1)
        saving = in_a_cohort(base, work, TRAIN.model_copy(update={"gradient_checkpointing": True}), dropout=0.1)
        assert max(small.gap(plain[c].adapter, saving[c].adapter) for c in RANKS) < 1e-12


def test_padding_stays_zero_under_every_local_rule(monkeypatch):
    """What a client of a smaller rank does not have must neither train, nor be decayed, penalised or corrected."""
    base, looked = small.model(), []
    leave = Pass._leave

    def look(self: Pass, active: int) -> None:
        for views in (self.stack.trained, self.stack.views(self.stack.flat.grad), self.stack.views(self.gradients)):
            for name, view in views.items():
                for k, own in enumerate(self.stack.adapters):
                    padding = torch.ones(view.shape[1:], dtype=torch.bool)
                    padding[tuple(slice(0, n) for n in own.tensors()[name].shape)] = False
                    assert not view[k][padding].any(), (name, k)
                    looked.append(int(padding.sum()))
        leave(self, active)

    monkeypatch.setattr(Pass, "_leave", look)
    rule = together(SCAFFOLDED, LocalRule(penalty=tails))
    start = {client: small.with_cores(a) for client, a in mixed(base).items()}
    in_a_cohort(base, handed(start), rule=rule)
    assert sum(looked) > 10_000


def test_a_whole_change_of_full_rank_is_evaluated_as_it_trains():
    """Evaluation stacks side and adapter into one; training keeps them apart. Their losses must be one number."""
    base = small.model()
    adapter, side = small.adapter(base, 4, 0), a_side(base, 3)
    dense = Adapter({path: from_delta(pair.delta()) for path, pair in side.pairs.items()})
    from sheepfold.adapter import combined

    rows = small.client_rows()
    still = TrainSettings(steps=1, batch_rows=99, lr=1e-30, optimizer="sgd")
    for one in (side, dense):
        work = handed(dict.fromkeys(RANKS, adapter), side=one)
        trained = in_a_cohort(base, work, still)
        engine = small.cohort_engine(base, still)
        means = engine.held_out([combined(one, adapter)], [(0, rows[c]) for c in RANKS], 8)
        engine.close()
        for client, mean in zip(RANKS, means, strict=True):
            assert mean.value == pytest.approx(trained[client].measurements.loss.value, rel=1e-12)
            assert mean.count == trained[client].measurements.loss.count
