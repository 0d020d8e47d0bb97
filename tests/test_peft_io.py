"""Adapters go through PEFT folders unchanged, and what plain LoRA does not have is refused."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.errors import AdapterMismatch, CheckpointError, ModelError
from sheepfold.peft_io import check_fits, read_peft, write_peft
from sheepfold.targets import find_targets, linear_shape
from tests import small

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=12
    ),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2),
}
IDS = torch.arange(20).reshape(2, 10)


def build(family="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]).eval()


def mixed_adapter(model, targets="all-linear"):
    """Ranks 1 to 4 and four alphas, so that patterns are needed."""
    pairs = {}
    for i, (path, site) in enumerate(find_targets(model, targets).items()):
        d_in, d_out = linear_shape(site)
        rank = 1 + i % 4
        pairs[path] = LoraPair(torch.randn(rank, d_in), torch.randn(d_out, rank), (3 + i % 3) / rank)
    return Adapter(pairs)


@pytest.fixture
def folder(tmp_path):
    """A plain PEFT folder for the llama."""
    write_peft(mixed_adapter(build()), tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", CONFIGS)
def test_plain_peft_computes_the_adapters_logits(family, tmp_path):
    model = build(family)
    adapter = mixed_adapter(model)
    expected = small.logits_with(model, adapter, IDS)
    write_peft(adapter, tmp_path, "base", fan_in_fan_out=family == "gpt2")
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, tmp_path)(IDS).logits
    assert (expected - build(family)(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_writing_and_reading_gives_the_same_bits_back(tmp_path):
    adapter = mixed_adapter(build())
    adapter = Adapter(adapter.pairs, {"lm_head.bias": torch.randn(32)})
    write_peft(adapter, tmp_path, "base")
    assert read_peft(tmp_path).hash() == adapter.hash()


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read_with_its_own_scale_and_ranks(rslora, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"q_proj": 5},
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(build(), config).eval()
    peft_model.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path)
    assert len(adapter.pairs) == 24
    assert adapter.ranks["model.layers.1.self_attn.q_proj"] == 2
    with torch.no_grad():
        torch.testing.assert_close(
            peft_model(IDS).logits, small.logits_with(build(), adapter, IDS), atol=1e-5, rtol=1e-5
        )


def test_a_bin_file_is_read_with_the_configuration_one_folder_up(folder, tmp_path):
    # Shepherd: lora-shepherd-7b/adapter_config.json and lora-shepherd-7b/<round>/adapter_model.bin.
    adapter = read_peft(folder)
    state = {}
    for path, pair in adapter.pairs.items():
        state[f"base_model.model.{path}.lora_A.default.weight"] = pair.A
        state[f"base_model.model.{path}.lora_B.default.weight"] = pair.B
    (tmp_path / "run" / "7").mkdir(parents=True)
    shutil.copy(folder / "adapter_config.json", tmp_path / "run")
    torch.save(state, tmp_path / "run" / "7" / "adapter_model.bin")
    assert read_peft(tmp_path / "run" / "7" / "adapter_model.bin").hash() == adapter.hash()
    with pytest.raises(ModelError, match="no such file; only it tells alpha"):
        read_peft(tmp_path / "run" / "7" / "adapter_model.bin", config=tmp_path / "nowhere.json")


def test_a_bin_folder_is_read_and_a_malicious_one_is_refused_unexecuted(folder, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    adapter = read_peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    state = {f"base_model.model.{p}.{names[h]}": getattr(adapter.pairs[p], h) for p in adapter.pairs for h in "AB"}
    torch.save(state, folder / "adapter_model.bin")
    assert read_peft(folder).hash() == adapter.hash()
    torch.save(state | {"x": Malicious()}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="could run code: refused"):
        read_peft(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
        ({"use_dora": True}, "use_dora is True, not plain LoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base too"),
        ({"r": 7}, r"do not belong to this configuration"),
        ({"lora_alpha": None}, "r or lora_alpha is missing"),
        ({"peft_type": None}, "peft_type is None"),
    ],
)
def test_a_configuration_that_is_not_plain_lora_is_refused_by_name(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises((ModelError, AdapterMismatch), match=message) as caught:
        read_peft(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"short"), "damaged or cut short"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors or adapter_model.bin"),
        (lambda f: (f / "adapter_config.json").unlink(), "no such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not a PEFT configuration"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a PEFT configuration"),
        (shutil.rmtree, "no such adapter"),
    ],
)
def test_missing_and_damaged_files_are_named_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        read_peft(folder)
    assert "\n" not in str(caught.value)
    assert "adapter" in str(caught.value)


def test_an_unknown_key_and_half_a_pair_are_errors(tmp_path):
    from safetensors.torch import load_file, save_file

    write_peft(mixed_adapter(build()), tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"lm_head.weight is no part of a plain LoRA adapter"):
        read_peft(tmp_path)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(AdapterMismatch, match="has lora_B without its other half"):
        read_peft(tmp_path)
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="other is no part"):
        read_peft(tmp_path)


def test_an_adapter_without_pairs_is_not_written(tmp_path):
    with pytest.raises(AdapterMismatch, match="no LoRA pairs"):
        write_peft(Adapter({}, {"prompt": torch.zeros(2)}), tmp_path, "base")


def test_a_place_that_cannot_be_written_is_named_and_the_old_files_stay(folder, tmp_path):
    before = read_peft(folder).hash()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_peft(mixed_adapter(build()), tmp_path / "file" / "adapter", "base")
    assert read_peft(folder).hash() == before
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_of_another_base_does_not_fit():
    model = build()
    adapter = mixed_adapter(model, ("q_proj",))
    check_fits(adapter, model)
    with pytest.raises(
        AdapterMismatch, match=r"model.layers.0.self_attn.q_proj: adapted, but in the base it is not there"
    ):
        check_fits(adapter, build("gpt2"))
    wrong = Adapter({"lm_head": adapter.pairs["model.layers.0.self_attn.q_proj"]})
    with pytest.raises(
        AdapterMismatch, match=r"lm_head: A is \(1, 16\), B is \(16, 1\), expected \(r, 16\) and \(32, r\)"
    ):
        check_fits(wrong, model)
    with pytest.raises(AdapterMismatch, match="in the base it is a LlamaMLP"):
        check_fits(Adapter({"model.layers.0.mlp": wrong.pairs["lm_head"]}), model)
