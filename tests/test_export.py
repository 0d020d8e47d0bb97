"""Exports compute what was evaluated, in plain transformers and plain PEFT, and leave the base alone."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, GPT2Config, LlamaConfig

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.card import Card
from sheepfold.errors import AdapterMismatch, CheckpointError, ConfigError
from sheepfold.export import export, export_merged, export_peft, merged, short_targets
from sheepfold.models import BUILTIN, Base, silence_dropout
from sheepfold.peft_io import read_peft
from sheepfold.targets import find_targets, linear_shape
from tests import small

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2
    ),
    "tied": LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2),
    "falcon": FalconConfig(
        vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, hidden_dropout=0.3
    ),
}
IDS = torch.arange(20).reshape(2, 10)
CARD = Card("base", "demo", "fedavg", 3)


def base_of(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()
    dropout = silence_dropout(model)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    return Base(model, tokenizer, "base", "", torch.device("cpu"), torch.float32, dropout)


def adapter_for(model, targets="all-linear"):
    torch.manual_seed(1)
    pairs = {}
    for path, site in find_targets(model, targets).items():
        d_in, d_out = linear_shape(site)
        pairs[path] = LoraPair(torch.randn(3, d_in) / 4, torch.randn(d_out, 3) / 4, 2 / 3)
    return Adapter(pairs)


def test_tied_weights_are_written_once_in_any_dtype(tmp_path):
    base = base_of("tied")
    adapter = adapter_for(base.model, ("q_proj",))
    names = []
    for dtype in (torch.float32, torch.bfloat16):
        export_merged(base, adapter, tmp_path / str(dtype), dtype)
        names.append(set(load_file(tmp_path / str(dtype) / "model.safetensors")))
    assert names[0] == names[1]
    assert "lm_head.weight" not in names[0]


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", "all-linear"), ("tied", ("q_proj", "lm_head")), ("tied", "auto"), ("gpt2", "auto"), ("falcon", "auto")],
)
def test_the_merged_model_has_the_evaluated_logits_and_the_base_stays_as_it_was(family, targets, tmp_path):
    base = base_of(family)
    adapter = adapter_for(base.model, targets)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    expected = small.logits_with(base.model, adapter, IDS)
    export_merged(base, adapter, tmp_path / "merged", card=CARD)
    after = base.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert (expected - base.model(IDS).logits).abs().max() > 0.01
        torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("sheep").input_ids == base.tokenizer("sheep").input_ids


def test_a_merged_model_is_published_with_the_dropout_and_dtype_of_its_own(tmp_path):
    base = base_of("falcon")
    export_merged(base, adapter_for(base.model), tmp_path / "merged", torch.bfloat16)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["hidden_dropout"], config["dtype"]) == (0.3, "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_merging_rounds_once_after_adding_in_float32():
    model = base_of("llama").model.bfloat16()
    adapter = adapter_for(model, ("q_proj",))
    path, pair = next(iter(adapter.pairs.items()))
    weight = merged(model, adapter)[f"{path}.weight"]
    assert weight.dtype == torch.float32
    expected = model.get_submodule(path).weight.double() + pair.delta()
    torch.testing.assert_close(weight.double(), expected, atol=1e-7, rtol=1e-7)


def test_whole_tensors_of_an_adapter_replace_the_bases():
    model = base_of("llama").model
    head = torch.ones(32, 16)
    assert torch.equal(merged(model, Adapter({}, {"lm_head.weight": head}))["lm_head.weight"], head)
    with pytest.raises(
        AdapterMismatch, match=r"score.weight: the adapter holds it whole, and the base has no such tensor"
    ):
        merged(model, Adapter({}, {"score.weight": head}))


def test_a_peft_export_names_its_targets_shortly_where_that_is_exact(tmp_path):
    model = base_of("llama").model
    adapter = adapter_for(model, ("q_proj", "v_proj"))
    export_peft(adapter, tmp_path, model, CARD)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    assert read_peft(tmp_path).hash() == adapter.hash()
    card = (tmp_path / "README.md").read_text()
    assert "base_model: base\n" in card
    assert "fedavg, 3 rounds" in card
    one = adapter_for(model, ("layers.1.self_attn.q_proj",))
    assert short_targets(one, model) == ["model.layers.1.self_attn.q_proj"]


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path):
    base = base_of("llama")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is there and not empty"):
        export_merged(base, adapter_for(base.model), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_nothing_behind(tmp_path):
    base = base_of("llama")
    adapter = adapter_for(base.model, ("q_proj",))
    wrong = Adapter(adapter.pairs, {"no.such": torch.zeros(1)})
    with pytest.raises(AdapterMismatch, match=r"no.such"):
        export_merged(base, wrong, tmp_path / "merged")
    with pytest.raises(AdapterMismatch, match="adapted, but in the base it is not there"):
        export_merged(base_of("gpt2"), adapter, tmp_path / "merged")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_merged(base, adapter, tmp_path / "file" / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_unknown_dtype_lists_the_known(tmp_path):
    with pytest.raises(ConfigError, match=r"--dtype 'fp16': .*float16"):
        export(tmp_path, tmp_path / "out", to="merged", dtype="fp16")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run's folder"):
        export(tmp_path, tmp_path / "out")
