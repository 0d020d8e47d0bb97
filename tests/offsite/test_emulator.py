"""What clients get: a smaller model in an ordinary folder, with nothing of the dropped layers in it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sheepfold import simulation
from sheepfold.assembly import assemble, foundation
from sheepfold.config import ModelSettings, build
from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.models import BUILTIN, load_base, load_tokenizer
from sheepfold.offsite import align, emulator
from tests.offsite import bases


@pytest.fixture(scope="module")
def received(closed, tmp_path_factory):
    """The folder that clients receive."""
    experiment = build({"model": {"base": str(closed)}, "offsite": bases.ENDS})
    return write(experiment, tmp_path_factory.mktemp("sent") / "received").folder


def write(experiment, out):
    tokenizer = load_tokenizer(experiment.model)
    return emulator.write(experiment, out, tokenizer, align.read_rows(experiment, tokenizer))


def test_no_tensor_of_a_dropped_layer_is_in_the_folder(closed, received):
    full, sent = emulator.hashes(closed), emulator.hashes(received)
    dropped = {h for name, h in full.items() if any(f".{i}." in name for i in bases.DROPPED)}
    kept = {h for name, h in full.items() if not any(f".{i}." in name for i in bases.DROPPED)}
    assert len(dropped) > 10
    assert set(sent.values()) == kept, "every other tensor is, to the bit"
    assert not dropped & set(sent.values())
    weights = [file for file in received.iterdir() if file.suffix in (".safetensors", ".bin", ".pt")]
    assert [file.name for file in weights] == ["model.safetensors"]
    size = sum(t.numel() * t.element_size() for t in load_file(weights[0]).values())
    assert weights[0].stat().st_size < size + 20_000, "and nothing is hidden beside them"


def test_the_folder_does_not_say_where_it_comes_from(closed, received):
    for file in received.rglob("*"):
        content = file.read_bytes()
        assert str(closed).encode() not in content, file.name
        assert closed.name.encode() not in content, file.name


def test_a_client_trains_without_the_full_model_and_never_holds_a_dropped_layer(closed, received, tmp_path):
    alone = tmp_path / "on-a-client"
    shutil.copytree(received, alone)
    values = {"offsite": None}
    parts = assemble(bases.run_of(alone, tmp_path, **values))
    full = emulator.hashes(closed)
    dropped = {h for name, h in full.items() if any(f".{i}." in name for i in bases.DROPPED)}
    in_memory = {emulator.tensor_hash(p) for p in parts.base.model.parameters()}
    parts.engine.close()
    assert len(in_memory) > 50
    assert not dropped & in_memory
    adapted = {int(name.split(".")[2]) for name in parts.initial.pairs}
    assert adapted == {0, 1, 4, 5}, "its adapter layers, and not the middle that it has too"
    whole = assemble(bases.run_of(alone, tmp_path, **values, adapter={"method": "full"}))
    assert {int(name.split(".")[2]) for name in whole.initial.extra} == {0, 1, 4, 5}
    assert not any(p.requires_grad for n, p in whole.base.model.named_parameters() if n not in whole.initial.extra)


def test_the_emulator_loads_as_plain_transformers_and_gives_the_cut_models_logits(closed, received):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(received, dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(closed, dtype=torch.float32)
    full.model.layers = torch.nn.ModuleList([full.model.layers[i] for i in (0, 1, 2, 5, 6, 7)])
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        expected = full(ids, use_cache=False).logits  # its places are still the full model's, which only a cache reads
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
        made = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 28), "with the cache too"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])  # bfloat16: what auto is on a GPU
def test_weights_keep_the_bits_they_were_published_with_and_a_tied_tensor_stays_one(dtype, tmp_path):
    # builtin:tiny: float16, tied
    experiment = build({"model": {"dtype": dtype}, "offsite": {"emu_r": 3, "drop_ratio": 0.0}})
    made = write(experiment, tmp_path / "out")
    tensors = load_file(made.folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert made.tensors == emulator.hashes(BUILTIN), "no number is rounded"
    assert "lm_head.weight" not in tensors
    assert made.parameters == made.full_parameters == 1_000_576


def test_a_changed_tensor_is_found(received, tmp_path):
    folder = tmp_path / "altered"
    shutil.copytree(received, folder)
    assert emulator.check(folder).cut.source == (0, 1, 2, 5, 6, 7)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"altered: model.layers.2.mlp.up_proj.weight is not what was written"):
        emulator.check(folder)
    (folder / "offsite.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"offsite.json: cannot be read .* write the emulator again"):
        emulator.check(folder)


def test_an_emulator_of_an_emulator_is_refused(received, tmp_path):
    with pytest.raises(ConfigError, match=r"model.base is an emulator already"):
        foundation(bases.run_of(received, tmp_path))


def test_the_command_writes_what_a_run_would(closed, tmp_path, monkeypatch, capsys):
    from sheepfold import cli

    (tmp_path / "own.yaml").write_text(f"model: {{base: {closed}}}\noffsite: {{emu_l: 2, emu_r: 6}}\n")
    words = ["sheepfold", "offsite", str(tmp_path / "own.yaml"), str(tmp_path / "out"), "offsite.train=[layers, norm]"]
    monkeypatch.setattr("sys.argv", [*words, "adapter.method=full"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    told = json.loads((tmp_path / "out" / "offsite.json").read_text())
    line = capsys.readouterr().out.strip()
    assert line.endswith(
        f"layers 0, 1, 2, 5, 6, 7 of 8; {told['parameters']:,} parameters, 89% of {told['full_parameters']:,}; "
        "to train: layers 0, 1, 6, 7, norm"
    ), line
    outcome = simulation.run(
        bases.run_of(closed, tmp_path, **{"federation.rounds": 1, "train.steps": 1, "offsite.evaluate": ["emu"]})
    )
    assert emulator.hashes(tmp_path / "out") == emulator.hashes(outcome.folder / "offsite" / "emulator")
    monkeypatch.setattr("sys.argv", ["sheepfold", "offsite", "demo", str(tmp_path / "more")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "demo: no offsite section" in capsys.readouterr().err


def test_the_command_refuses_a_cut_that_cannot_be_before_any_weight_is_loaded(closed, tmp_path, monkeypatch, capsys):
    from sheepfold import cli

    (tmp_path / "own.yaml").write_text(f"model: {{base: {closed}}}\noffsite: {{drop_ratio: 0.95}}\n")
    monkeypatch.setattr(emulator, "load_base", lambda *_: pytest.fail("the full model was loaded"))
    monkeypatch.setattr("sys.argv", ["sheepfold", "offsite", str(tmp_path / "own.yaml"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "offsite.drop_ratio 0.95: keeps round(6 x 0.05) = 0 of 6 middle layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_emulator_computes_in_the_dtype_that_is_asked_for(received):
    base = load_base(ModelSettings(base=str(received), dtype="bfloat16"), "cpu")
    assert base.dtype == torch.bfloat16


def test_a_client_cannot_train_what_the_owner_did_not_list(closed, received, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter.method 'ia3' on an emulator: its owner lists layers .* take lora"):
        foundation(bases.run_of(received, tmp_path, offsite=None, adapter={"method": "ia3"}))
    norm = {"model": {"base": str(closed)}, "adapter": {"method": "full"}, "offsite": bases.ENDS | {"train": ["norm"]}}
    folder = write(build(norm), tmp_path / "norm").folder
    with pytest.raises(ConfigError, match=r"adapter.method 'lora' on an emulator: its owner lists norm to train; take"):
        foundation(bases.run_of(folder, tmp_path, offsite=None))
    whole = assemble(bases.run_of(folder, tmp_path, offsite=None, adapter={"method": "full"}))
    assert list(whole.initial.extra) == ["model.norm.weight"]


def test_only_a_run_has_clients_to_give_an_emulator_to(closed, tmp_path):
    with pytest.raises(ConfigError, match=r"only a run has clients that get an emulator; .* \(offsite=null\)"):
        assemble(bases.run_of(closed, tmp_path))
