"""Bases load whole, frozen and silent from a folder or the package, or say in one line why not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sheepfold.config import ModelSettings
from sheepfold.errors import ConfigError, ModelError
from sheepfold.models import (
    BUILTIN,
    config_only,
    load_base,
    load_tokenizer,
    max_positions,
    pick_device,
    pick_dtype,
    silence_dropout,
)
from sheepfold.targets import find_targets, new_adapter
from sheepfold.tokenizers import read_tokenizer

IDS = torch.arange(4, 24).reshape(2, 10)
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path):
    """A copy of the built-in base, to be damaged."""
    return Path(shutil.copytree(BUILTIN, tmp_path / "base"))


def edit(folder, file="config.json", **changes):
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def load(folder, **settings):
    return load_base(ModelSettings(base=str(folder), **settings), "cpu")


def test_the_built_in_base_loads_frozen_in_float32_with_its_tokenizer():
    base = load_base(ModelSettings(), "cpu")
    assert (base.dtype, base.device.type, base.model.training) == (torch.float32, "cpu", False)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.eos_token_id in base.stop_ids
    assert base.tokenizer.chat_template
    plain = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, plain(IDS).logits)


def test_an_outline_has_the_shapes_of_the_base_and_no_weights():
    outline, base = config_only(ModelSettings(), "cpu"), load_base(ModelSettings(), "cpu")
    assert {p.device.type for p in outline.model.parameters()} == {"meta"}
    assert outline.parameters == sum(p.numel() for p in base.model.parameters())
    sites = find_targets(outline.model, "all-linear")
    assert new_adapter(sites, 2, 4, 0).hash() == new_adapter(find_targets(base.model, "all-linear"), 2, 4, 0).hash()
    assert outline.max_positions == max_positions(base.model.config) == base.model.config.max_position_embeddings
    assert max_positions(BloomConfig()) is None


def test_the_tokenizer_alone_is_the_bases():
    assert load_tokenizer(ModelSettings())("sheep 12").input_ids == load(BUILTIN).tokenizer("sheep 12").input_ids


def test_dtype_follows_the_device_unless_it_is_named():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("float64", cpu) == torch.float64
    assert load(BUILTIN, dtype="bfloat16").model.dtype == torch.bfloat16
    assert pick_device("cpu") == cpu
    with pytest.raises(ConfigError, match=r"device 'gpu': .*expected auto, cpu, cuda"):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="device 'cuda': ") as caught:
        pick_device("cuda")
    assert "\n" not in str(caught.value)
    assert pick_device("auto").type in ("cpu", "mps")


def test_attention_is_sdpa_and_eager_for_families_that_refuse_it(tmp_path, folder):
    assert load(folder).model.config._attn_implementation == "sdpa"
    assert load(folder, attention="eager").model.config._attn_implementation == "eager"
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=5000, hidden_size=16, n_head=2, n_layer=1))
    bloom.save_pretrained(folder)
    assert load(folder).model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"no sdpa attention; set model.attention to auto or eager"):
        load(folder, attention="sdpa")


def test_the_fingerprint_follows_the_numbers_and_nothing_else(folder, tmp_path):
    before = load(folder).fingerprint
    assert load(folder, dtype="float64").fingerprint == before
    assert load(shutil.copytree(folder, tmp_path / "elsewhere")).fingerprint == before
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert load(folder).fingerprint != before


SILENT = {
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "opt": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    "falcon": FalconConfig(**SMALL, hidden_dropout=0.5, attention_dropout=0.5),
    "bloom": BloomConfig(vocab_size=32, hidden_size=16, n_head=2, n_layer=2, hidden_dropout=0.5, attention_dropout=0.5),
    "llama": LlamaConfig(**SMALL, intermediate_size=24, attention_dropout=0.5),
    "phi": PhiConfig(**SMALL, intermediate_size=24, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
}


@pytest.mark.parametrize("family", SILENT)
def test_a_silenced_base_computes_the_same_in_training_mode(family):
    model = AutoModelForCausalLM.from_config(SILENT[family])
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        assert not torch.equal(model.train()(IDS).logits, expected)
        published = silence_dropout(model)
        assert torch.equal(model.train()(IDS).logits, expected)
    assert 0.5 in published.values()
    assert silence_dropout(model) == {}


def test_bin_weights_load_and_a_malicious_pickle_is_refused_unexecuted(folder, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    expected = load(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert all(torch.equal(t, expected[n]) for n, t in load(folder).model.state_dict().items())
    torch.save({"x": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"hold more than tensors \(\S*mkdir\).*refused; use a safetensors copy"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("blank", [False, True])
def test_the_tokenizer_class_of_old_llama_repositories_is_understood(folder, blank):
    expected = load(folder).tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LLaMATokenizer"}))
    edit(folder, "tokenizer_config.json", eos_token=expected.eos_token, bos_token=expected.bos_token)
    if blank:  # as decapoda-research/llama-7b-hf has them
        edit(folder, "tokenizer_config.json", eos_token="", bos_token="", unk_token="")
    tokenizer = load(folder).tokenizer
    assert tokenizer("The sheep eat 12.").input_ids == expected("The sheep eat 12.").input_ids
    assert tokenizer.eos_token_id == expected.eos_token_id


def test_a_missing_pad_token_becomes_a_known_one_and_the_embeddings_stay(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit(folder, "tokenizer_config.json", pad_token=None, unk_token=None)
    base = load(folder)
    assert base.tokenizer.pad_token_id in (base.tokenizer.eos_token_id, base.tokenizer.unk_token_id)
    assert base.model.get_input_embeddings().weight.shape[0] == rows


def test_a_missing_end_token_is_taken_from_the_configuration_or_refused(folder):
    expected = load(folder).tokenizer.eos_token_id
    edit(folder, "tokenizer_config.json", eos_token=None)
    edit(folder, eos_token_id=expected)
    assert load(folder).tokenizer.eos_token_id == expected
    edit(folder, eos_token_id=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ModelError, match=r"neither tokenizer nor config.json has an EOS token"):
        load(folder)


def test_every_stop_token_of_the_generation_config_ends_an_answer(folder):
    edit(folder, "generation_config.json", eos_token_id=[2, 5])
    base = load(folder)
    assert base.stop_ids == tuple(sorted({2, 5, base.tokenizer.eos_token_id}))


def drop_tensor(folder):
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "model.norm.weight"}, file, metadata={"format": "pt"})


def encoder(folder):
    shape = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertForMaskedLM(BertConfig(num_hidden_layers=1, **shape)).save_pretrained(folder)


def encoder_decoder(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


def small_embedding(folder):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=24))
    model.save_pretrained(folder)


def own_code(folder):
    edit(folder, model_type="herd", auto_map={"AutoConfig": "herd.Config", "AutoModelForCausalLM": "herd.Model"})


DAMAGES = {
    "no folder": (shutil.rmtree, "no such folder; give a folder, a hub id"),
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "unknown family": (lambda f: edit(f, model_type="herd"), "model type `?herd|model_type"),
    "own code": (own_code, "needs code from its repository, which is never run"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 9_000), "damaged or cut short"),
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged or cut short"),
    "lost tensor": (drop_tensor, "weights lack 1 tensors, such as model.norm.weight"),
    "other shapes": (lambda f: edit(f, intermediate_size=40), "do not have the shapes of config.json"),
    "encoder": (encoder, "BertForMaskedLM is not a causal language model"),
    "encoder-decoder": (encoder_decoder, "T5ForConditionalGeneration is not a causal language model"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("token*")], "no usable tokenizer .* set model.tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "no usable tokenizer"),
    "small embedding": (small_embedding, "the tokenizer has ids up to .*, the model 32 embedding rows"),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "gemma"])
def test_a_tokenizer_that_transformers_makes_of_nothing_is_refused(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match=r"no usable tokenizer .* special tokens and no words.* set model.tokenizer"):
        read_tokenizer(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_that_cannot_be_used_is_one_line_that_names_it(folder, damage):
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nobody/nothing", r"the hub cannot be reached .*`hf download nobody/nothing`\), or give a folder"),
        ("./nothing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("builtin:large", "the one that ships is builtin:tiny"),
        (__file__, "is a file; give the folder"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_next(base, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for attempt in (load_base, config_only):
        with pytest.raises(ModelError, match=message):
            attempt(ModelSettings(base=base), "cpu")


def test_a_tokenizer_may_come_from_elsewhere(folder, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(BUILTIN).save_pretrained(tokenizer)
    for file in folder.glob("token*"):
        file.unlink()
    assert (
        load(folder, tokenizer=str(tokenizer)).tokenizer("sheep").input_ids
        == load(BUILTIN).tokenizer("sheep").input_ids
    )
