"""A delta added to its base gives the tuned model, shard by shard, and nothing else gives anything."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sheepfold.deltas import apply_delta, make_delta
from sheepfold.errors import CheckpointError, ModelError
from sheepfold.models import BUILTIN

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def make(folder, seed, vocab=32, shards=False, dtype=torch.float16):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocab, **SHAPE)).to(dtype)
    model.save_pretrained(folder, max_shard_size="4KB" if shards else "5GB")
    return model.state_dict()


def state_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def as_bin(folder, old_format=False):
    """Rewrite a folder's safetensors as .bin, the way older transformers did."""
    for file in list(folder.glob("model*.safetensors")):
        new = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / new, _use_new_zipfile_serialization=not old_format)
        file.unlink()
    if (index := folder / "model.safetensors.index.json").is_file():
        text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.fixture
def folders(tmp_path):
    make(tmp_path / "base", seed=0)
    make(tmp_path / "delta", seed=1)
    return tmp_path


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_target_is_base_plus_delta_to_the_bit_of_float16_addition(kind, shards, tmp_path):
    base = make(tmp_path / "base", seed=0, shards=not shards)
    delta = make(tmp_path / "delta", seed=1, shards=shards)
    shutil.copy(BUILTIN / "tokenizer.json", tmp_path / "delta")
    if kind != "safetensors":
        as_bin(tmp_path / "base", kind == "old bin")
        as_bin(tmp_path / "delta", kind == "old bin")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "target")
    found = state_of(tmp_path / "target")
    assert found.keys() == delta.keys()
    assert all(torch.equal(found[name], base[name] + delta[name]) for name in delta)
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == (3 if shards else 1)
    assert (tmp_path / "target" / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert not list(tmp_path.glob(".*"))


def test_a_delta_made_from_a_tuned_model_gives_it_back(tmp_path):
    make(tmp_path / "base", seed=0, dtype=torch.float32)
    tuned = make(tmp_path / "tuned", seed=1, vocab=35, dtype=torch.float32)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "target")
    found = state_of(tmp_path / "target")
    for name, tensor in tuned.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=0)


def test_vocabulary_that_the_delta_adds_is_taken_as_it_is(tmp_path):
    # FastChat: the base's embeddings grow by rows of zeros, then the delta is added.
    base, delta = make(tmp_path / "base", seed=0), make(tmp_path / "delta", seed=1, vocab=33)
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "target")
    found = state_of(tmp_path / "target")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = torch.cat([base[name], torch.zeros(1, 16, dtype=torch.float16)])
        assert torch.equal(found[name], grown + delta[name])
    assert json.loads((tmp_path / "target" / "config.json").read_text())["vocab_size"] == 33


def test_a_base_in_another_dtype_gives_the_deltas_dtype(tmp_path):
    base = make(tmp_path / "base", seed=0, dtype=torch.float32)
    delta = make(tmp_path / "delta", seed=1)
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "target")
    for name, tensor in state_of(tmp_path / "target").items():
        assert torch.equal(tensor, (base[name] + delta[name].float()).half())


def test_buffers_of_old_llama_files_are_no_weights(folders):
    file = folders / "base" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    apply_delta(folders / "base", folders / "delta", folders / "target")
    assert not any("inv_freq" in name for name in state_of(folders / "target"))


def drop_tensor(folders):
    file = folders / "base" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "model.norm.weight"}, file)


def reshape_tensor(folders):
    file = folders / "base" / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(8)}, file)


def smaller_vocabulary(folders):
    shutil.rmtree(folders / "delta")
    make(folders / "delta", seed=1, vocab=30)


def malicious(folders):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(folders / "executed"),)

    (folders / "delta" / "model.safetensors").unlink()
    torch.save({"x": Malicious()}, folders / "delta" / "pytorch_model.bin")


def lost_shard(folders):
    shutil.rmtree(folders / "delta")
    make(folders / "delta", seed=1, shards=True)
    next((folders / "delta").glob("model-00002*")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, r"base: model.norm.weight is missing, and .*delta has it \(1 such tensors\)"),
        (reshape_tensor, r"model.norm.weight is \(16,\), in the base \(8,\); it belongs to another base"),
        (smaller_vocabulary, r"embed_tokens.weight is \(30, 16\), in the base \(32, 16\)|lm_head.weight is \(30, 16\)"),
        (malicious, "could run code: refused"),
        (lost_shard, "the index names it, and it is not there"),
        (lambda f: shutil.rmtree(f / "base"), "base: no such folder"),
        (lambda f: (f / "base" / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
        (lambda f: os.truncate(f / "delta" / "model.safetensors", 3000), "damaged or cut short"),
        (lambda f: (f / "base" / "config.json").write_text("{"), "missing, or not JSON"),
    ],
)
def test_what_does_not_belong_together_is_one_line_and_leaves_nothing(folders, damage, message):
    damage(folders)
    with pytest.raises(ModelError, match=message) as caught:
        apply_delta(folders / "base", folders / "delta", folders / "target")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folders.iterdir() if p.name not in ("base", "delta")) == []


def test_a_target_with_something_in_it_is_left_as_it_is(folders):
    (folders / "target").mkdir()
    (folders / "target" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="is there and not empty"):
        apply_delta(folders / "base", folders / "delta", folders / "target")
    (folders / "target" / "mine").unlink()
    apply_delta(folders / "base", folders / "delta", folders / "target")
    assert (folders / "target" / "model.safetensors").is_file()
