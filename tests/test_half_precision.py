"""bfloat16 and float16 bases: nothing becomes NaN, and what is learned and folded is float32 all the way."""

import numpy as np
import pytest
import torch

from sheepfold import simulation
from sheepfold import state as states
from sheepfold.adapter_methods import OVER_QUANTISED, SOFT
from sheepfold.config import AdapterSettings, GenerationSettings, TrainSettings
from sheepfold.engines import cohort_pass, peft_model
from sheepfold.engines.common import FIRST_LOSS_SCALE
from sheepfold.messages import Update
from sheepfold.strategies import AROUND, FOLDS
from tests import encoders, small
from tests.runs import experiment

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
ENGINES = pytest.mark.parametrize("make", [small.cohort_engine, small.peft_engine])
TRAIN = TrainSettings(steps=20, batch_rows=4, lr=1e-3, schedule="linear")
TOKENS = small.tokens(longest=16)
ROWS = [(k, rows) for k, rows in enumerate(small.client_rows().values())]


def adapters(base, family="llama"):
    return {c: small.adapter(base, 4, i, family, dtype=torch.float32) for i, c in enumerate(small.CLIENTS)}


def trained(engine, start) -> dict[str, Update]:
    answers = {a.client: a for a in engine.train(small.assignments(start))}
    engine.close()
    assert all(isinstance(a, Update) for a in answers.values())
    return answers


@ENGINES
@HALF
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_twenty_steps_lose_no_number_and_come_near_float32(make, dtype, attention):
    base, exact = small.model(dtype), small.model(torch.float32)
    base.set_attn_implementation(attention)
    start = adapters(base)
    ours, wide = (trained(make(b, TRAIN, tokens=TOKENS), start) for b in (base, exact))
    for client, update in ours.items():
        assert update.measurements.skipped_steps == 0
        assert {t.dtype for t in update.adapter.tensors().values()} == {torch.float32}
        assert update.measurements.loss.value == pytest.approx(wide[client].measurements.loss.value, rel=0.02)
        moved = small.gap(wide[client].adapter, start[client])
        assert 0 < small.gap(update.adapter, wide[client].adapter) < 1.5 * moved


@HALF
def test_gradients_add_up_in_float32_however_the_rows_of_a_step_are_cut(dtype):
    """One step of SGD at rate 1 is the gradient; PEFT's own, whose LoRA is float32 all the way, says what is near."""
    from sheepfold.state import BatchPlan

    tokens, numbers = small.tokens(64), {c: np.arange(16 * i, 16 * i + 16) for i, c in enumerate(small.CLIENTS)}
    train = TrainSettings(steps=1, batch_rows=16, lr=1.0, optimizer="sgd", grad_norm=None)

    def off(make, plan, dtype=dtype):
        base = small.model(dtype)
        start = adapters(base)
        engine = make(base, train, plan=plan, rows=numbers, tokens=tokens)
        done = {a.client: a.adapter.tensors() for a in engine.train(small.assignments(start, lr=1.0))}
        engine.close()
        return {(c, n): start[c].tensors()[n] - t for c in done for n, t in done[c].items()}

    exact = off(small.cohort_engine, BatchPlan(4, 16, 10_000), torch.float32)

    def error(gradients):
        return np.mean([float((g - exact[name]).norm() / exact[name].norm()) for name, g in gradients.items()])

    reference = error(off(small.peft_engine, BatchPlan(1, 16, 10_000)))
    for plan in (BatchPlan(4, 16, 10_000), BatchPlan(4, 1, 1), BatchPlan(1, 16, 10_000)):
        assert error(off(small.cohort_engine, plan)) < 2 * reference


def overflowing():
    """Return a float16 base whose gradients fit into float16, and not 4,096 times as large."""
    base = small.model(torch.float16)
    base.model.embed_tokens.weight.mul_(40)
    base.lm_head.weight.mul_(200)
    return base


@ENGINES
def test_a_scale_that_is_too_large_for_float16_is_halved_and_the_step_done_again(make, monkeypatch):
    base = overflowing()
    ids = torch.arange(3, 19)[None]
    hidden = base.model(input_ids=ids).last_hidden_state.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(base.lm_head(hidden)[0, :-1].float(), ids[0, 1:], reduction="sum")
    assert torch.autograd.grad(loss, hidden, retain_graph=True)[0].isfinite().all()
    assert not torch.autograd.grad(loss * FIRST_LOSS_SCALE, hidden)[0].isfinite().all(), "or nothing would overflow"
    start = adapters(base)
    scaled = trained(make(base, TRAIN, tokens=TOKENS), start)
    for module in (cohort_pass, peft_model):
        monkeypatch.setattr(module, "FIRST_LOSS_SCALE", 2.0)
    low = trained(make(overflowing(), TRAIN, tokens=TOKENS), start)
    for client, update in scaled.items():
        assert update.measurements.skipped_steps == 0
        assert update.adapter.is_finite()
        assert update.measurements.loss.value == pytest.approx(low[client].measurements.loss.value, rel=0.02)


@ENGINES
@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_padding_under_eager_attention_in_float16_harms_no_row(make, family):
    """Mistral's window is 8 tokens here: a padded position sees padding alone."""
    base = small.model(torch.float16, family)
    base.set_attn_implementation("eager")
    start = adapters(base, family)
    engine = make(base, TRAIN.model_copy(update={"steps": 2}), family)
    together = engine.held_out(list(start.values()), ROWS, 16)
    alone = engine.held_out(list(start.values()), ROWS, 1)
    assert [m.value for m in together] == pytest.approx([m.value for m in alone], rel=2e-3)
    settings = GenerationSettings(max_new_tokens=4)
    (answers,) = engine.generate(list(start.values()), [(0, np.arange(6))], settings, 0, [2])
    assert all(len(answer) and max(answer) < small.VOCABULARY for answer in answers)
    assert all(u.measurements.skipped_steps == 0 for u in trained(engine, start).values())


FEW = ("dora", "ia3", "vera", "oft", "ln_tuning", "prompt")


@HALF
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in FEW else pytest.mark.slow) for m in OVER_QUANTISED if m != "lora"],
)
def test_what_other_methods_train_is_float32(dtype, method):
    from sheepfold.engines.carriers import PeftCarrier

    options = {"road": {"group_size": 32}} | {soft: {"num_virtual_tokens": 4} for soft in SOFT}
    base = small.model(dtype, hidden_size=64, intermediate_size=128)
    carried = PeftCarrier(base, AdapterSettings(method=method, options=options.get(method, {})), 0)
    assert {t.dtype for t in carried.factors().values()} == {torch.float32}
    ids = torch.arange(3, 20)[None]
    out = carried.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert out.dtype == dtype
    torch.autograd.backward(out.float().square().sum())
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in carried.factors().values())


def test_a_head_beside_another_method_is_float32_too():
    from sheepfold.engines.carriers import PeftCarrier
    from sheepfold.tasks.classification import Classification

    base = encoders.model(torch.bfloat16, "distilbert")
    asked = Classification(labels=("a", "b"), measures=(), modules=None, new_head=False, seed=0)
    targets = {"target_modules": ["q_lin", "lin2"], "feedforward_modules": ["lin2"]}
    carried = PeftCarrier(base, AdapterSettings(method="ia3", options=targets), 0, asked)
    assert {t.dtype for t in carried.factors().values()} == {torch.float32}
    assert any("classifier" in name for name in carried.factors())


ARGUMENTS = {"fedprox": {"mu": 0.1}, "slora": {"stage_rounds": 1}, "fedopt": {"server": "adam"}}
LEFT_OUT = {"fedkd": "needs a teacher", "fedkseed": "trains the base's own numbers"}
OWN_FOLD = ("flora", "fedex", "flexlora", "hetlora", "fed_sb", "fedadam", "slora")
"""Strategies of the plain suite: each folds in a way of its own"""
IN_COHORT, IN_PEFT = ("cohort", "bfloat16"), ("peft_model", "float16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.saved(tmp_path_factory.mktemp("bases") / "base")


@pytest.mark.parametrize(("engine", "dtype"), [IN_COHORT, pytest.param(*IN_PEFT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in OWN_FOLD else pytest.mark.slow) for n in (*FOLDS, *AROUND) if n not in LEFT_OUT],
)
def test_every_strategy_folds_in_float32(tmp_path, folder, engine, dtype, name):
    asked = {"strategy": name, "strategy_args": ARGUMENTS.get(name, {}), "rounds": 2}
    over = {"model.base": str(folder), "model.dtype": dtype, "train.engine": engine, "evaluation.every": 0}
    outcome = simulation.run(experiment(tmp_path, federation=asked, **over))
    state = states.load(outcome.folder / "state" / "latest.safetensors")
    held = [*outcome.adapter.tensors().values(), *state.adapter.tensors().values(), *state.memory.values()]
    numbers = [t for t in held if t.is_floating_point()]
    assert all(t.dtype.itemsize >= 4 and t.isfinite().all() for t in numbers)
    assert outcome.state.round == 2
