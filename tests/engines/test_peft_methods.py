"""What every PEFT method must do in a federation: learn, fold, resume, answer, and leave for plain PEFT."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sheepfold import simulation
from sheepfold.adapter import Adapter, mean
from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from sheepfold.assembly import assemble, check
from sheepfold.config import AdapterSettings, Experiment, GenerationSettings, TrainSettings, build, dump
from sheepfold.data.rows import Message
from sheepfold.engines.carriers import PeftCarrier
from sheepfold.engines.peft_methods import UNFIT
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.errors import AdapterMismatch, ConfigError, DataError, ModelError
from sheepfold.evaluation.generation import decode, decoding, generate, pad_left
from sheepfold.state import BatchPlan
from tests import small
from tests.runs import experiment

TOKENS = {"num_virtual_tokens": 4}
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "dora": ("dora", {}, 0.02),
    "ia3": ("ia3", {}, 0.05),
    "prefix": ("prefix", TOKENS, 0.1),
    "prefix, projected": ("prefix", {**TOKENS, "prefix_projection": True}, 0.01),
    "p-tuning": ("p-tuning", {**TOKENS, "encoder_reparameterization_type": "MLP"}, 0.01),
    "p-tuning, lstm": (
        "p-tuning", {**TOKENS, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1}, 0.01,
    ),
    "prompt": ("prompt", {**TOKENS, "prompt_tuning_init": "RANDOM"}, 0.1),
}  # fmt: skip
"""name -> (adapter.method, adapter.options, learning rate)"""
SOFT = [name for name in METHODS if name.startswith("p")]
PLAIN = {
    ("dora", "gpt2"), ("ia3", "opt"), ("prefix", "llama"), ("prefix, projected", "opt"), ("p-tuning", "gpt2"),
    ("prompt", "llama"),
}  # fmt: skip
"""Whole runs that the plain suite makes; the slow one makes all."""
RUNS = [
    pytest.param(name, family, marks=() if (name, family) in PLAIN else pytest.mark.slow)
    for name in METHODS
    for family in ("llama", "gpt2", "opt")
]


@pytest.fixture(scope="module", autouse=True)
def on_one_thread():
    with small.one_thread():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: str(small.saved(folder / family, family)) for family in ("llama", "gpt2", "opt")}


def settings(name: str) -> AdapterSettings:
    method, options, _ = METHODS[name]
    return AdapterSettings(method=method, options=options, rank=4)


def made(tmp_path: Any, base: str, name: str, **over: Any) -> Experiment:
    method, options, lr = METHODS[name]
    return experiment(tmp_path, **{
        "model.base": base, "adapter.method": method, "adapter.options": options, "train.engine": "peft_model",
        "train.lr": lr, "data.max_tokens": 48, "keep_rounds": 1, **over,
    })  # fmt: skip


def carried(name: str, family: str = "llama", dtype: torch.dtype = torch.float64) -> PeftCarrier:
    return PeftCarrier(small.model(dtype, family), settings(name), seed=1)


def moved(adapter: Adapter, seed: int, by: float = 0.3) -> Adapter:
    """Return the adapter with random numbers added."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(extra={n: t + by * torch.randn(t.shape, generator=draw) for n, t in adapter.extra.items()})


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of one row's own tokens, (tokens, vocabulary)."""
    out: Tensor = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0, -len(ids) :]
    return out


def plain_peft(base: Any, folder: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


# --- whole runs


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_a_method_learns_resumes_to_the_bit_and_leaves_for_plain_peft(name, family, tmp_path, bases):
    from transformers import AutoModelForCausalLM

    run = made(tmp_path, bases[family], name)
    outcome = simulation.run(run)
    losses = [json.loads(line)["held_out"]["loss"]["weighted"] for line in (outcome.folder / "rounds.jsonl").open()]
    assert losses[-1] < losses[0] - 0.02
    assert simulation.run(run, resume_from=1).state.hash() == outcome.state.hash()

    parts = assemble(run)
    row, _ = parts.data.tokens.row(0)
    with parts.engine._showing(outcome.adapter):  # type: ignore[union-attr]
        with_run = logits(parts.engine.carrier.model, row)  # type: ignore[union-attr]
    plain = plain_peft(AutoModelForCausalLM.from_pretrained(bases[family]), outcome.folder / "adapter")
    torch.testing.assert_close(logits(plain, row), with_run, atol=1e-5, rtol=0)


def test_soft_prompts_answer_by_name_as_their_folder_does(tmp_path, bases):
    over = {"federation.rounds": 1, "personal.finetune_steps": 1}
    folder = simulation.run(made(tmp_path, bases["llama"], "p-tuning", **over)).folder
    greedy = GenerationSettings(max_new_tokens=6)
    with open_source(find(folder), "cpu") as opened:
        prompts = [opened.prompt([Message("user", text)], 6) for text in ("Hi", "Name three animals that fly.")]
        own = next(name for name in opened.names if name.startswith("client:"))
        rows = {name: opened.answer(prompts, [name], greedy, seed=0) for name in ("base", "federated", own)}
        for name, answers in rows.items():
            with opened.using([name]) as model:
                expected = [by_hand(model, prompt.ids, 6, ()) for prompt in prompts]
            assert [list(answer.ids) for answer in answers] == expected, name


# --- answers


def by_hand(model: Any, prompt: Tensor, new_tokens: int, eos: tuple[int, ...] = (2,)) -> list[int]:
    """Return the greedy answer, every step from the whole row, without padding and without a cache of its own."""
    ids = prompt
    for _ in range(new_tokens):
        token = int(logits(model, ids)[-1].argmax())
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([token])])
    return ids[len(prompt) :].tolist()


FAMILIES = [
    *("llama", "gpt2", "opt", "mistral"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "qwen3", "gemma", "phi")),
]
BOTH_WAYS = [
    *("prefix", "prompt"),  # through the cache, and through the embeddings
    *(pytest.param(name, marks=pytest.mark.slow) for name in SOFT if name not in ("prefix", "prompt")),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_rows_of_a_batch_answer_as_each_does_by_itself_without_a_cache(name, family, tmp_path):
    carrier = carried(name, family)
    carrier.write(moved(carrier.read(), seed=2))
    prompts = [small.tokens().row(n)[0][:length] for n, length in enumerate((3, 9, 5, 4))]
    options: dict[str, Any] = {"seed": 0, "pad_token_id": 0, "eos_token_ids": (2,)}
    expected = [by_hand(carrier.model, prompt, 6) for prompt in prompts]
    assert generate(carrier.model, prompts, GenerationSettings(max_new_tokens=6), **options) == expected
    beams = GenerationSettings(max_new_tokens=6, beams=3)
    alone = [generate(carrier.model, [prompt], beams, **options)[0] for prompt in prompts]
    assert generate(carrier.model, prompts, beams, **options) == alone

    carrier.model.save_pretrained(tmp_path)
    plain = plain_peft(small.model(torch.float64, family), tmp_path)
    assert generate(plain, prompts, GenerationSettings(max_new_tokens=6), **options) == expected
    with plain.disable_adapter():
        bare = generate(plain, prompts, GenerationSettings(max_new_tokens=6), **options)
    assert bare == [by_hand(small.model(torch.float64, family), prompt, 6) for prompt in prompts]


def test_padding_under_a_window_is_an_error_where_rows_cannot_be_put_apart():
    carrier = carried("prefix", "mistral")
    ids, mask = pad_left([torch.tensor([5, 6, 7]), torch.tensor([8])], 0)
    with pytest.raises(DataError, match=r"mistral attends within a window, .* one by one"):
        decode(carrier.model, ids, mask, decoding(3, 1, 0, ()))


def test_an_answer_leaves_room_for_the_virtual_tokens():
    carrier = carried("prompt", "opt")  # 64 positions
    prompt = torch.full((55,), 5)
    settings = GenerationSettings(max_new_tokens=30)
    [answer] = generate(carrier.model, [prompt], settings, seed=0, pad_token_id=0, eos_token_ids=())
    assert len(answer) == 64 - 4 - 55


# --- folds


@pytest.mark.parametrize("name", METHODS)
def test_equal_clients_return_themselves_and_one_client_is_the_fold(name):
    one = moved(carried(name, dtype=torch.float32).read(), seed=3)
    assert mean([(one, 2.5)]).hash() == one.hash()
    assert small.gap(mean([(one, 3.0), (one, 5.0), (one, 0.1)]), one) < 1e-7


def both(name: str) -> tuple[PeftCarrier, Adapter, Adapter, Adapter]:
    """Return a carrier, two clients' adapters, and their mean at weights 3 and 1."""
    carrier = carried(name)
    first, second = moved(carrier.read(), seed=4), moved(carrier.read(), seed=5)
    return carrier, first, second, mean([(first, 3), (second, 1)])


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_the_mean_of_prompts_and_prefixes_is_the_mean_of_what_clients_put_before_a_row(name):
    carrier, *adapters = both(name)
    first, second, folded = (prompt_of(carrier, adapter) for adapter in adapters)
    torch.testing.assert_close(folded, (3 * first + second) / 4)


@pytest.mark.parametrize("name", ["p-tuning", "p-tuning, lstm", "prefix, projected"])
def test_a_prompt_encoder_is_averaged_by_its_own_weights_and_exported_as_what_it_puts_out(name, tmp_path):
    from safetensors.torch import load_file

    carrier, first, second, folded = both(name)
    assert len(first.extra) > 1  # the encoder's own weights, not its output
    for key in folded.extra:
        torch.testing.assert_close(folded.extra[key], (3 * first.extra[key] + second.extra[key]) / 4)
    ours = prompt_of(carrier, folded)
    assert not torch.allclose(ours, (3 * prompt_of(carrier, first) + prompt_of(carrier, second)) / 4, atol=1e-3)
    carrier.write(folded)
    carrier.model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], ours)


def prompt_of(carrier: PeftCarrier, adapter: Adapter) -> Tensor:
    """Return what a soft prompt puts before a row, by PEFT's encoder itself."""
    carrier.write(adapter)
    encoder = carrier.model.prompt_encoder["default"]
    return encoder(torch.arange(4)[None])[0].detach()  # type: ignore[no-any-return]


def test_the_mean_of_ia3_is_the_mean_of_every_layers_scales_so_of_its_outputs():
    carrier, *adapters = both("ia3")
    outs = []
    for adapter in adapters:
        carrier.write(adapter)
        layer = carrier.model.get_base_model().model.layers[0].self_attn.k_proj
        outs.append(layer(torch.ones(1, 32, dtype=torch.float64)).detach())
    torch.testing.assert_close(outs[2], (3 * outs[0] + outs[1]) / 4)


def test_the_mean_of_dora_keeps_the_mean_magnitudes_of_the_weights_rows():
    """A row's length in the adapted weight is its magnitude, whatever A and B became."""
    carrier, first, second, folded = both("dora")
    lengths = []
    for adapter in (first, second, folded):
        carrier.write(adapter)
        layer = carrier.model.get_base_model().model.layers[0].self_attn.q_proj
        weight = layer(torch.eye(32, dtype=torch.float64)).detach().T
        lengths.append(weight.norm(dim=1))
    signs = [a.extra["model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"] for a in (first, second, folded)]
    torch.testing.assert_close(lengths[2], signs[2].abs().double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(signs[2], (3 * signs[0] + signs[1]) / 4)


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "fedex", "ffa_lora", "rolora", "fedsa", "fed_sb", "hetlora"])
def test_methods_about_a_and_b_refuse_dora_and_take_rslora(strategy, tmp_path):
    over = {"federation.strategy": strategy, "train.engine": "peft_model"}
    with pytest.raises(ConfigError, match=r"about LoRA's A and B, and adapter.method is 'dora'"):
        check(experiment(tmp_path, **over, **{"adapter.method": "dora"}))
    check(experiment(tmp_path, **over, **{"adapter.method": "rslora"}))


# --- rslora


def test_rslora_is_lora_whose_alpha_is_sqrt_of_the_rank_times_as_large(tmp_path, bases):
    written = AdapterSettings(method="rslora", rank=4, alpha=6)
    assert (written.method, written.alpha) == ("lora", 12.0)
    over = {"adapter.method": "rslora", "model.base": bases["llama"], "model.dtype": "float64"}
    both = [experiment(tmp_path, **over, **{"train.engine": engine}) for engine in ("cohort", "peft_model")]
    assert build(yaml.safe_load(dump(both[0]))) == both[0]
    runs = [simulation.run(run).adapter for run in both]
    assert small.gap(*runs) < 1e-6
    assert all(pair.scale == pytest.approx(16 / math.sqrt(4)) for pair in runs[0].pairs.values())


def test_rslora_says_what_peft_says():
    from peft import LoraConfig, get_peft_model

    base = small.model()
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    layer: Any = get_peft_model(base, config).base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    own = AdapterSettings(method="rslora", rank=4, alpha=6)
    assert layer.scaling["default"] == pytest.approx(own.alpha / own.rank)


@pytest.mark.parametrize("over", [{"ranks": [2, 4]}, {"start": "folder"}])
def test_rslora_has_one_rank(over):
    with pytest.raises(ConfigError, match="rslora scales by one rank; use lora"):
        build({"adapter": {"method": "rslora", **over}})


# --- gradient checkpointing


@pytest.mark.parametrize("name", ["dora", "ia3", "p-tuning", "prompt"])
def test_gradient_checkpointing_changes_nothing(name):
    def trained(checkpointing: bool) -> Adapter:
        base, ran = small.model(), 0

        def count(*_: object) -> None:
            nonlocal ran
            ran += torch.is_grad_enabled()

        train = TrainSettings(steps=2, batch_rows=4, engine="peft_model")
        tokens, rows = small.tokens(), small.client_rows()
        plan = BatchPlan(1, 4, 120, recompute=checkpointing)
        engine = PeftModelEngine(base, [], tokens, rows, train, settings(name), seed=1, plan=plan)
        base.model.layers[0].mlp.register_forward_pre_hook(count)
        [update] = engine.train(small.assignments({"ann": engine.initial()}, lr=0.05))
        assert ran == (4 if checkpointing else 2), "a layer runs again in each step's backward pass"
        adapter: Adapter = update.adapter  # type: ignore[union-attr]
        return adapter

    plain = trained(False)
    assert small.gap(plain, trained(True)) < 1e-6
    assert small.gap(plain, carried(name).read()) > 1e-2


# --- names and options


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"adapter_package": "peft", "adapter_method": "lora", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
            {"method": "lora", "rank": 8, "alpha": 32, "dropout": 0.1},
        ),
        (
            {"adapter_method": "prefix", "prefix_projection": False, "num_virtual_tokens": 20},
            {"method": "prefix_tuning", "options": {"prefix_projection": False, "num_virtual_tokens": 20}},
        ),
        (
            {
                "adapter_package": "peft",
                "adapter_method": "p-tuning",
                "encoder_reparameterization_type": "MLP",
                "encoder_dropout": 0.1,
                "num_virtual_tokens": 20,
            },
            {
                "method": "p_tuning",
                "options": {
                    "encoder_reparameterization_type": "MLP",
                    "encoder_dropout": 0.1,
                    "num_virtual_tokens": 20,
                },
            },
        ),
        (
            {"adapter_method": "prompt", "prompt_tuning_init": "RANDOM", "num_virtual_tokens": 20},
            {"method": "prompt_tuning", "options": {"prompt_tuning_init": "RANDOM", "num_virtual_tokens": 20}},
        ),
    ],
    ids=["lora", "prefix", "p-tuning", "prompt"],
)
def test_an_argument_list_of_fs_llm_is_a_section(arguments, expected, tmp_path):
    ours = AdapterSettings.model_validate(expected)
    assert AdapterSettings.model_validate([arguments]) == ours
    engine = {"train": {"engine": "peft_model"}}
    listed = build({"adapter": [arguments], **engine})
    assert listed == build({"adapter": expected, **engine})
    assert build(yaml.safe_load(dump(listed))) == listed
    check(listed)


SOME = {"num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ([], "expected a section, or FederatedScope-LLM's list of one mapping"),
        ([{"adapter_package": "adapterhub", "adapter_method": "lora"}], "adapter_package 'adapterhub': only peft"),
        ([{"adapter_method": "lora", "rr": 8}], "unknown key 'adapter.rr'"),
        ({"method": "prefix"}, "options.num_virtual_tokens is not set; prefix_tuning needs a number"),
        ({"method": "prompt", "options": {"num_virtual_tokens": 0}}, "options.num_virtual_tokens is 0"),
        ({"method": "p-tunning", "options": SOME}, "did you mean 'p_tuning'?"),
        ({"method": "rslorra"}, "did you mean 'rslora'?"),
        ({"method": "prompt", "options": {**SOME, "promt_tuning_init": "TEXT"}}, "did you mean 'prompt_tuning_init'?"),
        ({"method": "prompt", "options": {**SOME, "prompt_tuning_init": "RANDM"}}, "did you mean 'RANDOM'?"),
        ({"method": "prefix", "options": {**SOME, "prefix_projection": "no"}}, "expected true or false"),
        ({"method": "p-tuning", "options": {**SOME, "encoder_dropout": "a little"}}, "expected a number"),
        ({"method": "prefix", "options": {**SOME, "encoder_hidden_size": 8}}, "no effect without prefix_projection"),
        ({"method": "p-tuning", "options": {**SOME, "encoder_num_layers": 3}}, "no effect without LSTM"),
        ({"method": "dora", "options": {"r": 4}}, "adapter.options.r: say it as adapter.rank"),
        ({"method": "dora", "options": {"use_dora": False}}, "follows from the experiment; remove it"),
        ({"method": "ia3", "options": {"task_type": "SEQ_CLS"}}, "follows from the experiment; remove it"),
        ({"method": "adalora", "options": {"total_step": 9}}, "not possible here: it moves ranks"),
    ],
)
def test_what_is_wrong_with_a_method_is_one_line_before_anything_loads(adapter, message):
    with pytest.raises(ConfigError) as error:
        check(build({"adapter": adapter, "train": {"engine": "peft_model"}}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prefix_and_gradient_checkpointing_are_refused_before_anything_loads():
    train = {"engine": "peft_model", "gradient_checkpointing": True}
    with pytest.raises(ConfigError, match=r"checkpointing drops the attention cache, .*; set it to false"):
        build({"adapter": {"method": "prefix", "options": SOME}, "train": train})


def test_virtual_tokens_take_positions(tmp_path, bases):
    over = {"data.max_tokens": 61}
    with pytest.raises(ConfigError, match="has 64 positions, and 4 virtual tokens take some; set it to 60 or less"):
        assemble(made(tmp_path, bases["opt"], "prompt", **over))


# --- what would do nothing in silence


def test_targets_that_adapt_nothing_are_an_error():
    asked = AdapterSettings(method="ia3", options={"target_modules": ["k_proj", "c_fc"], "feedforward_modules": []})
    with pytest.raises(ModelError, match=r"adapter.options.target_modules: 'c_fc' adapts no module; .*k_proj"):
        PeftCarrier(small.model(), asked, 0)


def test_a_family_that_peft_has_no_default_for_is_one_line():
    from transformers import StableLmConfig, StableLmForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = StableLmForCausalLM(StableLmConfig(**shape, vocab_size=97, num_key_value_heads=4))
    with pytest.raises(ConfigError, match=r"adapter.options for ia3: PEFT refuses them: .*target_modules"):
        PeftCarrier(base, AdapterSettings(method="ia3"), 0)


def test_trained_tensors_without_a_part_in_the_output_are_an_error():
    """shadow's last layer trains a branch that nobody reads."""
    with pytest.raises(ConfigError, match=r"\d+ of \d+ trained tensors change nothing in this model"):
        PeftCarrier(small.model(torch.float32), AdapterSettings(method="shadow"), 0)


def test_an_adapter_of_other_options_does_not_fit():
    carrier = carried("prompt")
    other = PeftCarrier(small.model(), AdapterSettings(method="prompt", options={"num_virtual_tokens": 3}), 1).read()
    with pytest.raises(AdapterMismatch, match=r"shape \(3, 32\), expected \(4, 32\)"):
        carrier.write(other)
    with pytest.raises(AdapterMismatch, match="in one of adapter and model only"):
        carrier.write(replace(other, extra={}))


FURTHER: dict[str, dict[str, Any]] = {
    "beft": {}, "delora": {"r": 4}, "deft": {"r": 4}, "fourierft": {"n_frequency": 10},
    "glora": {"r": 4}, "gralora": {}, "hira": {"r": 4}, "hra": {}, "lily": {}, "ln_tuning": {}, "loha": {}, "lokr": {},
    "oft": {"oft_block_size": 8}, "osf": {}, "randlora": {}, "vblora": {"num_vectors": 16, "vector_length": 8},
    "vera": {}, "cartridge": TOKENS,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", FURTHER)
def test_further_methods_of_peft_train_and_leave_too(method, tmp_path):
    base, train = small.model(torch.float32), TrainSettings(steps=6, batch_rows=4, engine="peft_model")
    asked = AdapterSettings(method=method, options=FURTHER[method])
    plan = BatchPlan(1, 4, 120)
    engine = PeftModelEngine(base, [], small.tokens(), small.client_rows(), train, asked, seed=1, plan=plan)
    start = engine.initial()
    [update] = engine.train(small.assignments({"ann": start}, lr=0.02))
    adapter: Adapter = update.adapter  # type: ignore[union-attr]
    own = small.client_rows()["ann"]
    before, after = engine.held_out([start, adapter], [(0, own), (1, own)], 8)
    assert after.value < before.value
    row, _ = small.tokens().row(0)
    with engine._showing(adapter):
        ours = logits(engine.carrier.model, row)
        engine.carrier.model.save_pretrained(tmp_path)
    plain = plain_peft(small.model(torch.float32), tmp_path)
    torch.testing.assert_close(logits(plain, row), ours, atol=1e-5, rtol=0)


def test_what_a_round_cannot_train_is_not_offered():
    with pytest.raises(ConfigError) as error:
        check(build({"adapter": {"method": "loraa"}, "train": {"engine": "peft_model"}}))
    assert not any(f" {name}," in str(error.value) for name in UNFIT)


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16), ("8", "16"), (8.0, 16), (8, "1.6e1")])
def test_rslora_scales_numbers_however_they_are_written(rank, alpha):
    settings = AdapterSettings.model_validate({"method": "rslora", "rank": rank, "alpha": alpha})
    assert settings.alpha == pytest.approx(16 * 8**0.5)


def test_the_closing_tables_base_is_the_bare_base_and_no_path_of_this_machine_leaves(tmp_path):
    over = {"adapter": {"method": "prompt", "options": {"num_virtual_tokens": 4}}}
    plain = {"train.engine": "peft_model", "evaluation.every": 0, "baselines": ["local"], "federation.rounds": 1}
    soft, lora = (simulation.run(experiment(tmp_path, **plain, **more)) for more in (over, {}))
    scores = [outcome.closing.scores["loss"] for outcome in (soft, lora)]
    assert {c: s["base"] for c, s in scores[0].items()} == pytest.approx({c: s["base"] for c, s in scores[1].items()})
    written = json.loads((soft.folder / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "builtin:tiny"
