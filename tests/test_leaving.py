"""Adapters side by side load with plain PEFT, and a GGUF holds the merged model, or is refused."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from sheepfold import simulation
from sheepfold.adapter import Adapter, LoraPair
from sheepfold.answering.source import find
from sheepfold.errors import CheckpointError, ConfigError, ModelError
from sheepfold.export import export, merged
from sheepfold.gguf_writer import PRE_TOKENIZERS, pre_tokenizer, rotated
from sheepfold.models import load_base
from sheepfold.multi_adapter import evened, folder_names
from tests import runs, small

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose clients have adapters and ranks of their own."""
    folder = tmp_path_factory.mktemp("leaving")
    over = {"model": {"base": str(small.saved(folder / "base"))}, "adapter.rank": 8, "stop.key": "loss.plain"}
    over |= {"adapter.ranks": [2, 4], "federation.strategy": "flexlora", "personal.finetune_steps": 1}
    with small.one_thread():
        return simulation.run(runs.experiment(folder, **over)).folder


def test_every_adapter_of_a_run_loads_with_plain_peft_and_answers_as_it_did(run, tmp_path):
    from peft import PeftModel

    out, source = export(run, tmp_path / "all", to="adapters"), find(run)
    index = json.loads((out / "adapters.json").read_text())
    assert [entry["name"] for entry in index] == list(source.names[1:])
    assert len(index) == 6
    base = load_base(source.model, "cpu").model
    wanted = {entry["path"]: small.logits_with(base, source.adapter(entry["name"]), IDS) for entry in index}
    plain = AutoModelForCausalLM.from_pretrained(source.model.base, dtype=torch.float32)
    first = index[0]["path"]
    model = PeftModel.from_pretrained(plain, out / first, adapter_name=first)
    for entry in index[1:]:
        model.load_adapter(out / entry["path"], adapter_name=entry["path"])
    for entry in index:
        model.set_adapter(entry["path"])
        config = json.loads((out / entry["path"] / "adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (entry["rank"], {}, {})
        assert entry["hash"] == source.adapter_hash(entry["name"])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(IDS).logits, wanted[entry["path"]], rtol=0, atol=1e-4)


def test_the_readme_of_many_adapters_has_commands_that_fit_them(run, tmp_path):
    readme = (export(run, tmp_path / "all", to="adapters") / "README.md").read_text()
    assert "--max-lora-rank 8 --lora-modules" in readme
    assert "  client-client-0=./client-client-0" in readme
    code = readme.split("Plain PEFT:\n\n```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")


def test_folders_of_adapters_never_clash_and_suit_peft():
    assert folder_names(["federated", "client:a.b", "client:a/b", "client:A_B", "client:é"]) == [
        "federated", "client-a_b", "client-a_b-2", "client-A_B-3", "client-_",
    ]  # fmt: skip


def test_evening_keeps_the_update():
    torch.manual_seed(0)
    pairs = {
        "a": LoraPair(torch.randn(2, 5), torch.randn(7, 2), 0.3),
        "b": LoraPair(torch.randn(4, 5), torch.randn(7, 4), 1.7, torch.randn(4, 4)),
    }
    even = evened(Adapter(pairs))
    assert set(even.ranks.values()) == {4}
    assert len({pair.scale for pair in even.pairs.values()}) == 1
    for path, pair in pairs.items():
        torch.testing.assert_close(even.pairs[path].delta(), pair.delta(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("float16", False), ("bfloat16", False)])
def test_a_gguf_holds_the_merged_model_and_its_tokenizer(run, tmp_path, dtype, exact):
    from gguf import GGUFReader, dequantize

    out, source = export(run, tmp_path / "out", to="gguf", dtype=dtype), find(run)
    reader = GGUFReader(out / "model.gguf")
    base = load_base(source.model, "cpu")
    state = merged(base.model, source.adapter("federated"))
    told = {tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    layer = "model.layers.1."
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        (layer + "self_attn.q_proj.weight", "blk.1.attn_q.weight"),
        (layer + "self_attn.k_proj.weight", "blk.1.attn_k.weight"),
        (layer + "mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        (layer + "input_layernorm.weight", "blk.1.attn_norm.weight"),
    ):
        wanted = rotated(ours, state[ours], base.model.config)
        if not exact and wanted.ndim == 2:
            wanted = wanted.to(getattr(torch, dtype)).float()
        assert torch.equal(told[theirs], wanted), ours
    assert len(told) == len(state)
    tokens = [bytes(reader.fields["tokenizer.ggml.tokens"].parts[i]).decode() for i in field(reader, "tokens").data]
    assert tokens == base.tokenizer.convert_ids_to_tokens(range(len(tokens)))
    assert bytes(field(reader, "pre").parts[-1]).decode() == "smollm"
    assert field(reader, "add_bos_token").parts[-1][0] == 0
    assert "GGUF" in (out / "README.md").read_text()


def field(reader, name):
    return reader.fields[f"tokenizer.ggml.{name}"]


def test_rotating_rows_puts_each_heads_halves_side_by_side():
    class Config:
        num_attention_heads, num_key_value_heads = 2, 1

    weight = torch.arange(8.0)[:, None]
    assert rotated("x.q_proj.weight", weight, Config).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rotated("x.k_proj.weight", weight, Config).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert rotated("x.v_proj.weight", weight, Config) is weight


def test_a_cut_at_line_feeds_is_left_out_only_where_no_token_crosses_one():
    lines = {"type": "Split", "pattern": {"Regex": "\\n"}, "behavior": "Isolated", "invert": False}
    steps = PRE_TOKENIZERS["smollm"][0]
    told = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [steps[0], lines, steps[1]]}}
    assert pre_tokenizer(told | {"model": {"vocab": {"\u010a": 0, "a": 1}}}) == "smollm"
    assert pre_tokenizer(told | {"model": {"vocab": {"\u010a\u010a": 0}}}) is None
    assert pre_tokenizer({"pre_tokenizer": None, "model": {"vocab": {}}}) is None


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "GPT2LMHeadModel: our GGUF writer knows LlamaForCausalLM"),
        ("mistral", "sliding_window is 8, and our GGUF writer knows None alone"),
    ],
)
def test_what_a_gguf_of_ours_cannot_hold_is_refused_in_one_line(family, message, tmp_path):
    from sheepfold.gguf_writer import write

    model = small.model(torch.float32, family)
    model.config.architectures = [type(model).__name__]
    with pytest.raises(ModelError, match=message) as raised:
        write(tmp_path / "x.gguf", model.config, None, {}, torch.float32, "x")
    assert "--llama-cpp FOLDER" in str(raised.value)


def test_another_tokenizer_is_refused_and_nothing_is_left_behind(run, tmp_path, monkeypatch):
    from tokenizers import normalizers

    from sheepfold import export as exports

    real = exports.load_base

    def lowering(*args, **more):
        base = real(*args, **more)
        base.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        return base

    monkeypatch.setattr(exports, "load_base", lowering)
    with pytest.raises(ModelError, match=r"a tokenizer that rewrites text first \(Lowercase\)"):
        export(run, tmp_path / "out", to="gguf")
    assert list(tmp_path.iterdir()) == []


CONVERTER = """\
import sys, pathlib
model, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
if "bf16" in sys.argv:
    sys.exit("Traceback ...\\nNotImplementedError: no such tokenizer")
assert (model / "config.json").is_file() and (model / "model.safetensors").is_file()
out.write_bytes(b"GGUF")
"""


def test_llama_cpps_converter_reads_the_merged_model_and_its_failure_is_one_line(run, tmp_path, monkeypatch):
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    with pytest.raises(ConfigError, match=r"no convert_hf_to_gguf.py in it"):
        export(run, tmp_path / "out", to="gguf", llama_cpp=checkout)
    (checkout / "convert_hf_to_gguf.py").write_text(CONVERTER)
    out = export(run, tmp_path / "out", to="gguf", llama_cpp=checkout)
    assert (out / "model.gguf").read_bytes() == b"GGUF"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.gguf"]
    monkeypatch.setenv("LLAMA_CPP", str(checkout))
    with pytest.raises(ModelError, match=r"llama.cpp's converter failed: NotImplementedError: no such tokenizer"):
        export(run, tmp_path / "other", to="gguf", dtype="bfloat16")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "merge"}, "--to 'merge': did you mean 'merged'"),
        ({"to": "peft", "dtype": "float16"}, "--dtype float16 has no effect with --to peft"),
        ({"to": "merged", "llama_cpp": "x"}, "--llama-cpp has no effect with --to merged"),
        ({"to": "adapters", "best": True}, "leave out --best and --client"),
        ({"to": "gguf", "dtype": "float64"}, "a gguf holds float32, float16 or bfloat16"),
    ],
)
def test_options_that_cannot_go_together_are_one_line(run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_one_adapters_folder_has_no_clients(run, tmp_path):
    with pytest.raises(ConfigError, match="is one adapter, not a run; leave out --best and --client"):
        export(run / "adapter", tmp_path / "out", client="client-0")
    with pytest.raises(CheckpointError, match="not a run's folder, nor an adapter's"):
        export(tmp_path, tmp_path / "out")


def test_a_missing_gguf_package_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"--to gguf needs gguf.*sheepfold\[gguf\]"):
        export(run, tmp_path / "out", to="gguf")
