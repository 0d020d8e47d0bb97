"""The cohort engine against plain PEFT, one client at a time, and against itself under other plans."""

import numpy as np
import pytest
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import TrainSettings
from sheepfold.errors import AdapterMismatch, ConfigError
from sheepfold.local.optimizers import ELEMENTWISE
from sheepfold.local.rules import local_rule
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.state import BatchPlan
from tests import small

RAGGED = TrainSettings(epochs=5, batch_rows=4, micro_rows=2, lr=1e-3, schedule="linear", weight_decay=0.01)
"""20, 15, 20 and 25 steps for the four clients; last steps of an epoch are short."""
RANKS = {"ann": 2, "bob": 4, "cleo": 8, "dora": 4}


def adapters(base, dtype=torch.float64, family="llama") -> dict[str, Adapter]:
    return {c: small.adapter(base, r, seed, family, dtype) for seed, (c, r) in enumerate(RANKS.items())}


def trained(engine, work) -> dict[str, Update]:
    answers = list(engine.train(work))
    assert [a.client for a in answers] == [w.client for w in work]
    return {a.client: a for a in answers}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_a_cohort_equals_plain_peft_one_client_at_a_time(dtype, bound):
    base = small.model(dtype)
    work = small.assignments(adapters(base, dtype))
    engine = small.cohort_engine(base, RAGGED)
    ours = trained(engine, work)
    engine.close()
    reference = trained(small.peft_engine(base, RAGGED), work)
    moved = min(small.gap(ours[w.client].adapter, w.adapter) for w in work)
    assert moved > 1e-3, "training must change the adapters, or the comparison is empty"
    for client in ours:
        assert small.gap(ours[client].adapter, reference[client].adapter) < bound
        assert ours[client].measurements.steps == reference[client].measurements.steps
        assert ours[client].measurements.loss.value == pytest.approx(
            reference[client].measurements.loss.value, rel=1e-5
        )
        assert ours[client].adapter.ranks == work[0].adapter.ranks | dict.fromkeys(
            ours[client].adapter.pairs, RANKS[client]
        )


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_every_elementwise_optimizer_equals_one_of_its_own_for_each_client(name):
    base = small.model()
    train = TrainSettings(steps=4, batch_rows=4, lr=1e-3, optimizer=name.lower(), schedule="cosine", warmup_steps=1)
    train = train.model_copy(update={"epochs": 1, "steps": None})  # unequal steps: unequal learning rates
    work = small.assignments(adapters(base))
    engine = small.cohort_engine(base, train)
    ours = trained(engine, work)
    engine.close()
    reference = trained(small.peft_engine(base, train), work)
    assert max(small.gap(ours[c].adapter, reference[c].adapter) for c in ours) < 1e-9


def test_the_plan_changes_no_result():
    base = small.model()
    work = small.assignments(adapters(base))
    results = []
    for plan in (BatchPlan(4, 2, 120), BatchPlan(1, 4, 10_000), BatchPlan(3, 1, 30)):
        engine = small.cohort_engine(base, RAGGED, plan=plan)
        results.append(trained(engine, work))
        engine.close()
    for other in results[1:]:
        assert max(small.gap(results[0][c].adapter, other[c].adapter) for c in other) < 1e-10


def test_the_same_plan_gives_the_same_bits():
    base = small.model(torch.float32)
    work = small.assignments(adapters(base, torch.float32))
    hashes = []
    for _ in range(2):
        engine = small.cohort_engine(base, RAGGED, dropout=0.1)
        hashes.append([u.adapter.hash() for u in trained(engine, work).values()])
        engine.close()
    assert hashes[0] == hashes[1]


def test_dropout_is_the_same_alone_and_in_a_cohort_and_follows_the_seed():
    base = small.model()
    work = small.assignments(adapters(base))
    train = RAGGED.model_copy(update={"epochs": 1})
    together, alone, other, without = (
        _train_and_close(small.cohort_engine(base, train, **over), work)
        for over in (
            {"dropout": 0.3, "plan": BatchPlan(4, 2, 120)},
            {"dropout": 0.3, "plan": BatchPlan(1, 4, 10_000)},
            {"dropout": 0.3, "seed": 2},
            {},
        )
    )
    for client in together:
        assert small.gap(together[client].adapter, alone[client].adapter) < 1e-10
        assert small.gap(together[client].adapter, other[client].adapter) > 1e-4
        assert small.gap(together[client].adapter, without[client].adapter) > 1e-4


def _train_and_close(engine, work):
    try:
        return trained(engine, work)
    finally:
        engine.close()


def test_gradient_checkpointing_runs_every_layer_twice_and_changes_no_result():
    base = small.model()
    work = small.assignments(adapters(base))
    train = RAGGED.model_copy(update={"epochs": 1})
    calls = []
    # before the layer's end: recomputation stops as soon as it has what the backward pass needs
    base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
    plain = _train_and_close(small.cohort_engine(base, train, dropout=0.1), work)
    once = len(calls)
    saving = train.model_copy(update={"gradient_checkpointing": True})
    with_it = _train_and_close(small.cohort_engine(base, saving, dropout=0.1), work)
    assert len(calls) == 3 * once > 0
    assert not base.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    assert not any(module._forward_hooks for module in base.modules()), "the base is as it was"
    assert max(small.gap(plain[c].adapter, with_it[c].adapter) for c in plain) < 1e-12


@pytest.mark.parametrize("mu", [0.0, 5.0])
def test_a_local_rule_acts_on_both_engines_alike(mu):
    base = small.model()
    work = small.assignments(adapters(base))
    rule = local_rule("proximal", {"mu": mu})
    train = RAGGED.model_copy(update={"epochs": 2})
    ours = _train_and_close(small.cohort_engine(base, train, rule=rule), work)
    without = _train_and_close(small.cohort_engine(base, train), work)
    reference = trained(small.peft_engine(base, train, rule=rule), work)
    for client in ours:
        assert small.gap(ours[client].adapter, reference[client].adapter) < 1e-10
        difference = small.gap(ours[client].adapter, without[client].adapter)
        assert difference == 0 if mu == 0 else difference > 1e-5


def test_a_row_that_overflows_costs_its_client_the_step_and_nobody_else_anything():
    base = small.model()
    poison = small.VOCABULARY - 1
    base.model.embed_tokens.weight[poison] = torch.nan
    rows = small.tokens()
    ids = np.where(rows.ids == poison, 3, rows.ids)
    numbers = small.client_rows()
    ids[rows.offsets[numbers["bob"][2]]] = poison
    rows = type(rows)(ids, rows.is_target, rows.offsets, rows.prompt_tokens, rows.cut)
    work = small.assignments(adapters(base))
    train = RAGGED.model_copy(update={"epochs": 2})
    ours = _train_and_close(small.cohort_engine(base, train, tokens=rows), work)
    assert ours["bob"].measurements.skipped_steps == 2  # once an epoch
    assert "nan" in ours["bob"].measurements.why_skipped
    assert ours["bob"].measurements.processed_rows < 2 * 11
    assert all(u.adapter.is_finite() for u in ours.values())
    others = [w for w in work if w.client != "bob"]
    without = _train_and_close(small.cohort_engine(base, train, tokens=rows), others)
    assert max(small.gap(ours[c].adapter, without[c].adapter) for c in without) < 1e-10
    reference = trained(small.peft_engine(base, train, tokens=rows), work)
    assert max(small.gap(ours[c].adapter, reference[c].adapter) for c in ours) < 1e-10


def test_a_client_without_a_single_good_step_returns_no_update_and_says_why():
    base = small.model()
    rows = small.tokens()
    is_target = rows.is_target.copy()
    numbers = small.client_rows()
    is_target[rows.offsets[numbers["bob"][0]] : rows.offsets[numbers["bob"][-1] + 1]] = False
    rows = type(rows)(rows.ids, is_target, rows.offsets, rows.prompt_tokens, rows.cut)
    start = adapters(base)
    broken = start["dora"].to()
    next(iter(broken.pairs.values())).B[:] = torch.inf
    train = RAGGED.model_copy(update={"epochs": 1})
    for make in (small.cohort_engine, small.peft_engine):
        engine = make(base, train, tokens=rows, rows=numbers | {"ann": np.array([], dtype=np.int64)})
        answers = {a.client: a for a in engine.train(small.assignments(start | {"dora": broken}))}
        engine.close()
        assert isinstance(answers["cleo"], Update)
        reasons = {c: a.reason for c, a in answers.items() if isinstance(a, Absence)}
        assert sorted(reasons) == ["ann", "bob", "dora"]
        assert "no training rows" in reasons["ann"]
        assert "no label" in reasons["bob"]
        assert "nan" in reasons["dora"]


def test_later_rounds_draw_the_rows_that_earlier_ones_did_not():
    base = small.model()
    train = TrainSettings(steps=4, batch_rows=4, lr=1e-3)
    start = adapters(base)
    twice = TrainSettings(steps=8, batch_rows=4, lr=1e-3, optimizer="sgd")
    once = train.model_copy(update={"optimizer": "sgd"})
    whole = _train_and_close(small.cohort_engine(base, twice), small.assignments(start))
    first = _train_and_close(small.cohort_engine(base, once), small.assignments(start))
    work = [Assignment(c, 1, u.adapter, 1e-3, first_step=4) for c, u in first.items()]
    second = _train_and_close(small.cohort_engine(base, once), work)
    assert max(small.gap(whole[c].adapter, second[c].adapter) for c in whole) < 1e-12


@pytest.mark.parametrize("name", ["lbfgs", "adafactor", "asgd"])
def test_an_optimizer_that_couples_elements_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=r"use train\.engine peft_model"):
        small.cohort_engine(small.model(), TrainSettings(steps=1, optimizer=name))


def test_adapters_of_different_modules_are_refused():
    base = small.model()
    start = adapters(base)
    start["bob"] = Adapter(dict(list(start["bob"].pairs.items())[1:]))
    engine = small.cohort_engine(base, TrainSettings(steps=1))
    with pytest.raises(AdapterMismatch, match="adapted by some clients only"):
        list(engine.train(small.assignments(start)))


def test_half_precision_trains_without_a_single_number_lost():
    for dtype in (torch.float16, torch.bfloat16):
        base = small.model(dtype)
        work = small.assignments(adapters(base, torch.float32))
        exact = small.model(torch.float32)
        ours = _train_and_close(small.cohort_engine(base, RAGGED), work)
        wide = _train_and_close(small.cohort_engine(exact, RAGGED), work)
        for client in ours:
            assert ours[client].measurements.skipped_steps == 0
            assert ours[client].adapter.is_finite()
            assert ours[client].measurements.loss.value == pytest.approx(wide[client].measurements.loss.value, rel=0.02)


def test_held_out_loss_is_the_mean_over_target_tokens_however_rows_are_batched():
    base = small.model()
    rows, numbers, start = small.tokens(), small.client_rows(), adapters(base)
    engine = small.cohort_engine(base, RAGGED)
    work = [(k, numbers[c]) for k, c in enumerate(start)] + [(0, numbers["dora"])]
    means = engine.held_out(list(start.values()), work, 7)
    for batch in (1, 60):
        again = engine.held_out(list(start.values()), work, batch)
        assert [m.value for m in again] == pytest.approx([m.value for m in means], rel=1e-12)
    engine.close()
    assert [m.count for m in means] == [float(rows.target_tokens()[n].sum()) for _, n in work]
    reference = small.peft_engine(base, RAGGED).held_out(list(start.values()), work, 7)
    assert [m.value for m in means] == pytest.approx([m.value for m in reference], rel=1e-9)


def test_closing_puts_the_base_back():
    base = small.model()
    names = [n for n, _ in base.named_modules()]
    engine = small.cohort_engine(base, RAGGED)
    assert [n for n, _ in base.named_modules()] != names
    engine.close()
    assert [n for n, _ in base.named_modules()] == names


def test_the_reference_engine_evaluates_without_dropout_even_before_it_trained():
    base = small.model()
    start = adapters(base)["ann"]
    rows = [(0, np.arange(8))]
    plain = small.peft_engine(small.model(), RAGGED).held_out([start], rows, 4)
    fresh = small.peft_engine(base, RAGGED, dropout=0.5).held_out([start], rows, 4)
    assert fresh[0].value == plain[0].value


def test_a_client_that_overflows_in_half_precision_leaves_the_others_their_loss_scale():
    base = small.model(torch.float16)
    start = adapters(base, torch.float32)
    broken = start["bob"].to()
    for pair in broken.pairs.values():
        pair.B.mul_(3e4)
    engine = small.cohort_engine(base, RAGGED.model_copy(update={"epochs": 1}))
    with_it = {a.client: a for a in engine.train(small.assignments(start | {"bob": broken}))}
    others = {c: a for c, a in start.items() if c != "bob"}
    without = {a.client: a for a in engine.train(small.assignments(others))}
    engine.close()
    assert isinstance(with_it["bob"], Absence)
    for client in others:
        assert small.gap(with_it[client].adapter, without[client].adapter) < 2e-3
