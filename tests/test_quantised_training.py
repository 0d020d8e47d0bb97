"""Training over bases of 8 and 4 bits: engines agree, the base stays as it is, what was learned goes elsewhere."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sheepfold import adapter_methods, quantised, simulation
from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from sheepfold.config import AdapterSettings, ModelSettings, TrainSettings
from sheepfold.errors import ConfigError, ModelError
from sheepfold.export import export
from sheepfold.messages import Update
from sheepfold.models import config_only, load_base
from sheepfold.peft_io import read_peft
from tests import small
from tests.marks import mostly_slow
from tests.runs import experiment

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")

BOTH = pytest.mark.parametrize("bits", [8, 4])
USUAL = pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
"""Both, but the plain suite has the one that is further from the base"""
TRAIN = TrainSettings(
    epochs=5, batch_rows=4, micro_rows=2, lr=1e-3, schedule="linear", weight_decay=0.01, optimizer_args={"eps": 1e-6}
)
"""15 to 25 steps a client. Adam's first step is a gradient's sign, and one of 1e-9 has its sign from rounding: eps."""
TOKENS = small.tokens(longest=16)
NARROW = {"hidden_size": 64, "intermediate_size": 128}
"""The narrowest base that 4 bits take on a CPU."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.saved(tmp_path_factory.mktemp("bases") / "base", **NARROW)


def base_of(folder, bits, dtype="float32"):
    return load_base(ModelSettings(base=str(folder), bits=bits, dtype=dtype), "cpu").model


def adapters(base, ranks=(2, 4, 8, 4)):
    return {
        client: small.adapter(base, rank, seed, dtype=torch.float32)
        for seed, (client, rank) in enumerate(zip(small.CLIENTS, ranks, strict=True))
    }


def trained(engine, work) -> dict[str, Update]:
    answers = {a.client: a for a in engine.train(work)}
    engine.close()
    assert all(isinstance(a, Update) for a in answers.values())
    return answers


def furthest(left, right) -> float:
    return max(small.gap(left[client].adapter, right[client].adapter) for client in left)


@BOTH
def test_a_cohort_equals_plain_peft_over_a_quantised_base(folder, bits):
    base = base_of(folder, bits)
    work = small.assignments(adapters(base))
    ours = trained(small.cohort_engine(base, TRAIN, tokens=TOKENS), work)
    reference = trained(small.peft_engine(base, TRAIN, tokens=TOKENS), work)
    whole = trained(small.cohort_engine(base_of(folder, None), TRAIN, tokens=TOKENS), work)
    assert furthest(ours, reference) < 5e-5
    assert furthest(ours, whole) > 5e-4, "quantised weights must make a difference, or the comparison is empty"
    assert min(small.gap(ours[w.client].adapter, w.adapter) for w in work) > 1e-3


@USUAL
def test_sixteen_clients_together_equal_each_of_them_alone(folder, bits):
    from sheepfold.state import BatchPlan

    base = base_of(folder, bits)
    sizes = np.random.default_rng(0).integers(4, 12, 16)
    ends = np.cumsum(sizes)
    rows = {f"c{i}": np.arange(end - n, end) for i, (n, end) in enumerate(zip(sizes, ends, strict=True))}
    tokens = small.tokens(int(ends[-1]), longest=16)
    start = {name: small.adapter(base, 4, i, dtype=torch.float32) for i, name in enumerate(rows)}
    train = TRAIN.model_copy(update={"epochs": None, "steps": 20})
    together, alone = (
        trained(
            small.cohort_engine(base, train, rows=rows, tokens=tokens, plan=plan),
            small.assignments(start),
        )
        for plan in (BatchPlan(16, 4, 400), BatchPlan(1, 4, 10_000))
    )
    assert furthest(together, alone) < 5e-5


@USUAL
@pytest.mark.parametrize("make", [small.cohort_engine, small.peft_engine])
def test_losses_fall_and_no_number_of_the_base_moves_even_after_an_evaluation(folder, bits, make):
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs, and then has no gradients."""
    base = base_of(folder, bits)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    start = adapters(base, ranks=(4, 4, 4, 4))
    engine = make(base, TRAIN, tokens=TOKENS)
    work = [(k, rows) for k, rows in enumerate(small.client_rows().values())]
    first = [mean.value for mean in engine.held_out(list(start.values()), work, 8)]
    learned = {a.client: a.adapter for a in engine.train(small.assignments(start))}
    last = [mean.value for mean in engine.held_out([learned[c] for c in start], work, 8)]
    fresh = {
        a.client: a.adapter for a in make(base_of(folder, bits), TRAIN, tokens=TOKENS).train(small.assignments(start))
    }
    engine.close()
    assert all(after < then - 0.02 for then, after in zip(first, last, strict=True))
    assert all(learned[c].hash() == fresh[c].hash() for c in learned), "an evaluation before must change nothing"
    plain = base if make is small.cohort_engine else base_of(folder, bits)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@BOTH
def test_a_row_does_not_depend_on_the_rows_beside_it(folder, bits):
    """LLM.int8() would take the columns of one row's outliers out of all rows' rounding."""
    base = base_of(folder, bits)
    layer = base.model.layers[0].self_attn.q_proj
    row = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    loud = torch.cat([row, 50 * row])
    torch.testing.assert_close(layer(loud)[:1], layer(row), rtol=0, atol=1e-5)
    weight = quantised.weight(layer)
    torch.testing.assert_close(layer(row), row @ weight.T, rtol=0, atol=1e-5)


@USUAL
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_strategy_gets_the_weight_that_clients_compute_with(tmp_path, bits, family):
    narrow = NARROW if family == "llama" else {"n_embd": 64}
    place = small.saved(tmp_path / "base", family, **narrow)
    plain, packed = base_of(place, None), base_of(place, bits)
    from sheepfold.assembly import _weight

    sites = small.sites(packed, family)
    assert sites
    assert all(quantised.is_quantised(layer) for layer in sites.values())
    for path, layer in small.sites(plain, family).items():
        exact, ours = _weight({path: layer}, path), _weight(sites, path)
        assert ours.shape == exact.shape
        off = float((ours - exact).norm() / exact.norm())
        assert 1e-4 < off < (0.02 if bits == 8 else 0.15)


@BOTH
def test_what_a_quantised_base_takes_is_known_before_it_is_loaded(folder, bits):
    settings = ModelSettings(base=str(folder), bits=bits, dtype="bfloat16")
    outline, model = config_only(settings, "cpu"), load_base(settings, "cpu").model
    taken = 0
    for module in model.modules():
        if quantised.is_quantised(module):
            scale = module.weight.SCB if bits == 8 else None
            state = None if bits == 8 else module.weight.quant_state
            scales = [scale] if state is None else [state.absmax, state.state2.absmax]
            taken += module.weight.nbytes + sum(s.nbytes for s in scales)
        else:
            taken += sum(p.nbytes for p in module.parameters(recurse=False))
    assert outline.bytes == taken < config_only(settings.model_copy(update={"bits": None}), "cpu").bytes


@USUAL
@pytest.mark.parametrize("dtype", mostly_slow(["float16", "bfloat16"], quick=["float16"]))
def test_half_precision_over_a_quantised_base_loses_no_step(folder, bits, dtype):
    base = base_of(folder, bits, dtype)
    assert {p.dtype for p in base.parameters() if p.is_floating_point()} == {getattr(torch, dtype)}
    work = small.assignments(adapters(base))
    for make in (small.cohort_engine, small.peft_engine):
        for update in trained(make(base, TRAIN, tokens=TOKENS), work).values():
            assert update.measurements.skipped_steps == 0
            assert {t.dtype for t in update.adapter.tensors().values()} == {torch.float32}
            assert update.adapter.is_finite()


@USUAL
@pytest.mark.parametrize("engine", ["cohort", "peft_model"])
def test_a_whole_run_resumes_is_judged_as_it_trained_and_leaves_for_plain_peft(tmp_path, folder, bits, engine):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    asked = {"model.base": str(folder), "model.bits": bits, "train.engine": engine, "train.steps": 4}
    whole = simulation.run(experiment(tmp_path, keep_rounds=1, **asked))
    lines = [json.loads(line) for line in (whole.folder / "rounds.jsonl").read_text().splitlines()]
    loss = [line["held_out"]["loss"]["weighted"] for line in lines]
    assert loss[-1] < loss[0]
    again = simulation.run(experiment(tmp_path, keep_rounds=1, **asked), resume_from=1)
    assert again.adapter.hash() == whole.adapter.hash()
    source, row = find(str(whole.folder)), torch.arange(3, 30)
    with open_source(source, "cpu") as as_trained, open_source(source, "cpu", bits=0) as plain:
        assert (as_trained.bits, plain.bits) == (bits, None)
        assert as_trained.score([row], ["federated"]) != plain.score([row], ["federated"])
        with plain.using(["federated"]) as model, torch.no_grad():
            expected = model(row[None]).logits
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), whole.folder / "adapter")
    torch.testing.assert_close(loaded.eval()(row[None]).logits, expected, rtol=0, atol=1e-4)
    assert f"quantised to {bits} bits" in (whole.folder / "model_card.md").read_text()


def test_an_adapter_is_merged_into_the_whole_base_and_that_is_said(tmp_path, folder):
    outcome = simulation.run(experiment(tmp_path, **{"model.base": str(folder), "model.bits": 4}))
    said: list[str] = []
    merged = load_file(export(outcome.folder, tmp_path / "merged", to="merged", say=said.append) / "model.safetensors")
    assert "quantised to 4 bits while clients trained" in "\n".join(said)
    assert "quantised to 4 bits" in (tmp_path / "merged" / "README.md").read_text()
    base = load_file(folder / "model.safetensors")
    adapter = read_peft(outcome.folder / "adapter")
    for path, pair in adapter.pairs.items():
        expected = base[f"{path}.weight"] + pair.delta().float()
        torch.testing.assert_close(merged[f"{path}.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "strategy",
    [
        {"strategy": "fedex"},
        {"strategy": "fed_sb", "strategy_args": {"start": "base"}},
        pytest.param({"strategy": "flora"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "flexlora"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "slora", "strategy_args": {"stage_rounds": 1}}, marks=pytest.mark.slow),
    ],
    ids=lambda s: s["strategy"],
)
def test_strategies_that_change_the_base_go_over_quantised_ones_in_both_engines_alike(tmp_path, folder, strategy):
    made = [
        simulation.run(
            experiment(
                tmp_path / engine,
                federation={"rounds": 2, **strategy},
                **{"model.base": str(folder), "model.bits": 4, "train.engine": engine, "evaluation.every": 0},
            )
        ).adapter
        for engine in ("cohort", "peft_model")
    ]
    assert small.gap(*(adapter.plain() for adapter in made)) < 5e-5


REFUSED = {
    "full": ({"adapter": {"method": "full"}}, "adapter.method 'full'"),
    "seeds": (
        {"adapter": {"method": "seeds"}, "federation.strategy": "fedkseed"},
        "adapter.method 'seeds'",
    ),
    "a method that multiplies by the weights": ({"adapter": {"method": "hra"}}, "it needs whole weights"),
    "offsite": ({"offsite": {"emu_r": 1}}, "with offsite"),
    "float64": ({"model.dtype": "float64"}, "no more exact than float32"),
    "other bits": ({"model.bits": 3}, "8 or 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_quantised_weights_cannot_do_is_one_line_in_the_experiment(tmp_path, name):
    values, told = REFUSED[name]
    with pytest.raises(ConfigError, match=r"model\.bits") as raised:
        experiment(tmp_path, **{"model.bits": 4, **values})
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_the_extra_it_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else there(name, *a)
    )
    made = experiment(tmp_path, **{"model.bits": 8, "model.base": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"model\.bits 8 needs bitsandbytes.*sheepfold\[quant\]"):
        simulation.run(made)


def test_rows_need_not_be_whole_blocks(tmp_path):
    """bitsandbytes itself begins a block anew with every row when it writes a weight out on a CPU."""
    place = small.saved(tmp_path / "base", hidden_size=48, intermediate_size=88)
    plain, packed = base_of(place, None), base_of(place, 4)
    for path, layer in small.sites(packed).items():
        exact = plain.get_submodule(path).weight
        assert float((quantised.weight(layer) - exact).norm() / exact.norm()) < 0.12


def test_weights_that_are_quantised_already_are_refused_by_name(tmp_path, folder):
    base = small.saved(tmp_path / "base", **NARROW)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\).*remove model\.bits"):
        base_of(base, 4)


OPTIONS = {"road": {"group_size": 32}} | {method: {"num_virtual_tokens": 4} for method in adapter_methods.SOFT}


@USUAL
@pytest.mark.parametrize("method", [m for m in adapter_methods.OVER_QUANTISED if m != "lora"])
def test_other_methods_of_peft_begin_where_a_quantised_base_is_and_leave_it_there(folder, bits, method):
    from sheepfold.engines.carriers import PeftCarrier

    base = base_of(folder, bits)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = base(ids).logits
    carried = PeftCarrier(base, AdapterSettings(method=method, options=OPTIONS.get(method, {})), 0)
    with torch.no_grad():
        fresh = carried.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -27:]
    if method not in adapter_methods.SOFT:
        torch.testing.assert_close(fresh, before, rtol=0, atol=1e-4)
    params = [p.requires_grad_() for p in carried.factors().values()]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    losses = []
    for _ in range(4):
        logits = carried.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -27:-1]
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = base_of(folder, bits)
    plain = {name: layer for name, layer in expected.named_modules() if quantised.is_quantised(layer)}
    found = {name.replace(".base_layer", ""): layer for name, layer in carried.model.get_base_model().named_modules()}
    assert plain
    for name, layer in plain.items():
        assert torch.equal(quantised.weight(found[name]), quantised.weight(layer))


@pytest.mark.parametrize("method", ["ia3", "prompt"])
def test_other_methods_of_peft_go_through_whole_runs_over_4_bits(tmp_path, folder, method):
    options = {"num_virtual_tokens": 4} if method == "prompt" else {}
    made = experiment(
        tmp_path,
        **{"adapter": {"method": method, "options": options}, "model.base": str(folder), "model.bits": 4},
        **{"train.lr": 3e-2, "train.steps": 4, "federation.rounds": 1},
    )
    outcome = simulation.run(made)
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out"]["loss"]["weighted"] < lines[0]["held_out"]["loss"]["weighted"]


def test_dora_is_told_of_weights_that_bitsandbytes_would_write_out_wrong(tmp_path):
    base = small.saved(tmp_path / "base")
    made = experiment(tmp_path, adapter={"method": "dora"}, **{"model.base": str(base), "model.bits": 4})
    with pytest.raises(ModelError, match=r"q_proj is 32 wide, .* take lora, or model\.bits 8"):
        simulation.run(made)
