"""`sheepfold models shrink`: a folder of some of a base's layers, which plain transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sheepfold.config import ModelSettings
from sheepfold.loading import quiet
from sheepfold.models import BUILTIN, load_base
from sheepfold.tasks.classification import Classification
from tests import encoders, small
from tests.test_cli import typed

CUT = {"layers": "encoder.layer", "total": 8, "source": [0, 2, 3, 4, 5, 7], "bottom": 1, "top": 1, "train": ["layers"]}
SIX = {"num_hidden_layers": 6, "vocab_size": 1536}


def base(folder: Path, name: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of six layers with a tokenizer."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    with quiet():
        cls(cls.config_class(**config)).to(dtype).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(BUILTIN).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    return base(tmp_path / "bert", "BertModel", encoders.BERT | SIX, torch.float16)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_real_encoder_shrinks_to_every_other_layer(capsys, minilm, tmp_path):
    code, out, err = typed(capsys, "models", "shrink", minilm, tmp_path / "student", "--layers", "1,3,5")
    assert (code, err) == (0, "")
    assert out == f"layers 1, 3, 5 of 6, 17,389,824 of 22,713,216 parameters: {tmp_path / 'student'}\n"
    student = transformers.AutoModel.from_pretrained(tmp_path / "student")
    teacher = transformers.AutoModel.from_pretrained(minilm)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")(
        ["a fold of sheep", "one flock, many shepherds, and a gate"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = teacher.embeddings(input_ids=tokens["input_ids"], token_type_ids=tokens["token_type_ids"])
        hidden_states = [hidden]
        mask = tokens["attention_mask"][:, None, None, :].bool()
        for index in (1, 3, 5):
            hidden = teacher.encoder.layer[index](hidden, attention_mask=mask)
            hidden_states.append(hidden)
        told = student(**tokens, output_hidden_states=True)
    assert len(told.hidden_states) == 4
    for ours, by_hand in zip(told.hidden_states, hidden_states, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(told.pooler_output, teacher.pooler(hidden), rtol=0, atol=1e-5)


def test_the_built_in_model_shrinks_and_answers(capsys, tmp_path):
    code, out, _ = typed(capsys, "models", "shrink", "builtin:tiny", tmp_path / "half", "--layers", "0,2-3")
    assert code == 0
    assert "layers 0, 2, 3 of 4, 799,616 of 1,000,576 parameters" in out
    half = load_base(ModelSettings(base=str(tmp_path / "half")), "cpu")
    assert half.model.config.num_hidden_layers == 3
    ids = half.tokenizer("Sheep", return_tensors="pt")["input_ids"]
    assert half.model.generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 1
    kept, whole = tensors(tmp_path / "half"), tensors(BUILTIN)
    assert torch.equal(kept["model.layers.1.mlp.up_proj.weight"], whole["model.layers.2.mlp.up_proj.weight"])
    readme = (tmp_path / "half" / "README.md").read_text()
    assert "Layers 0, 2, 3 of the 4 of `builtin:tiny`" in readme
    assert "1910.01108" in readme


def test_the_class_and_number_format_of_the_file_stay(capsys, bert, tmp_path):
    assert typed(capsys, "models", "shrink", bert, tmp_path / "out", "--layers", "1-3")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert config["num_hidden_layers"] == 3
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float16}
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "`bert`" in readme
    assert str(tmp_path) not in readme


def test_a_classifier_keeps_its_head_and_its_labels(capsys, tmp_path):
    config = encoders.DISTILBERT | {"n_layers": 6, "vocab_size": 1536, "id2label": {0: "bad", 1: "good"}}
    folder = base(tmp_path / "judge", "DistilBertForSequenceClassification", config)
    assert typed(capsys, "models", "shrink", folder, tmp_path / "out", "--layers", "0,5")[0] == 0
    assert torch.equal(tensors(tmp_path / "out")["classifier.weight"], tensors(folder)["classifier.weight"])
    task = Classification(labels=("bad", "good"))
    assert load_base(ModelSettings(base=str(tmp_path / "out")), "cpu", task=task).model.config.n_layers == 2


def test_tensors_beside_the_named_class_stay_in_the_file(capsys, tmp_path):
    """bert-base-uncased names BertForMaskedLM, and its file holds the pooler that classifiers need."""
    folder = base(tmp_path / "base", "BertForPreTraining", encoders.BERT | SIX)
    edit(folder, architectures=["BertForMaskedLM"])
    code, _, err = typed(capsys, "models", "shrink", folder, tmp_path / "out", "--layers", "1,3,5")
    assert (code, err) == (0, "")
    kept, whole = tensors(tmp_path / "out"), tensors(folder)
    assert {n for n in whole if ".layer." not in n} == {n for n in kept if ".layer." not in n}
    for name, tensor in kept.items():
        origin = name
        for place, index in enumerate((1, 3, 5)):
            origin = name.replace(f".layer.{place}.", f".layer.{index}.") if f".layer.{place}." in name else origin
        assert torch.equal(tensor, whole[origin])


def test_tensors_of_blocks_that_the_class_does_not_have_are_left_out_aloud(capsys, bert, tmp_path):
    more = {"encoder.layer.6.output.dense.weight": torch.zeros(32, 64), "encoder.layer.0.gate": torch.zeros(2)}
    save_file(tensors(bert) | more, bert / "model.safetensors", metadata={"format": "pt"})
    code, _, err = typed(capsys, "models", "shrink", bert, tmp_path / "out", "--layers", "0")
    assert code == 0
    assert err == "note: 2 tensors that BertModel does not have are left out, such as encoder.layer.0.gate\n"
    assert not set(more) & set(tensors(tmp_path / "out"))


def test_a_list_is_named_where_there_are_two(capsys, tmp_path):
    bart = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 1536}
    folder = base(tmp_path / "bart", "BartModel", bart | heads)
    code, _, err = typed(capsys, "models", "shrink", folder, tmp_path / "out", "--layers", "0,2")
    assert code == 2
    assert "2 lists of 3 blocks" in err
    words = ("models", "shrink", folder, tmp_path / "out", "--layers", "0,2", "--list", "encoder.layers")
    assert typed(capsys, *words)[0] == 0
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").config.encoder_layers == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("", "'' is no number from 0 and no range; write 1,3,5 or 0-3,8"),
        ("1,,3", "'' is no number"),
        ("-1", "'-1' is no number"),
        ("one", "'one' is no number"),
        ("3-1", "the range 3-1 runs backwards; write 1-3"),
        ("0-6", "there is no block 6; this model has 6, 0 to 5"),
        ("3,1", "block 1 is named behind 3"),
        ("1-3,2", "block 2 is named behind 3"),
        ("0-999999999", "no number"),
    ],
)
def test_layers_that_are_not_there_are_one_line_before_weights_are_read(layers, message, capsys, bert, tmp_path):
    (bert / "model.safetensors").unlink()
    code, out, err = typed(capsys, "models", "shrink", bert, tmp_path / "out", f"--layers={layers}")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


def lacking(folder: Path) -> None:
    save_file({n: t for n, t in tensors(folder).items() if "pooler" not in n}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "has no config.json"),
        (no_weights, "has no weights"),
        (no_tokenizer, "no usable tokenizer"),
        (lacking, "the weights lack 2 tensors, such as pooler.dense.bias"),
        (lambda folder: edit(folder, architectures=None), "architectures of its config.json is []"),
        (
            lambda folder: edit(folder, architectures=["OurOwnBert"]),
            "is ['OurOwnBert']; expected the name of one class",
        ),
        (lambda folder: edit(folder, architectures=["BertConfig"]), "expected the name of one class"),
        (lambda folder: edit(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "weights are quantised"),
        (lambda folder: edit(folder, sheepfold_offsite=CUT), "is an emulator, whose layers its owner chose"),
    ],
)
def test_bases_that_cannot_be_cut_are_one_line_and_leave_nothing(spoil, message, capsys, bert, tmp_path):
    spoil(bert)
    code, out, err = typed(capsys, "models", "shrink", bert, tmp_path / "out", "--layers", "1,3,5")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert"]


def test_a_folder_with_something_in_it_is_refused_before_weights_are_read(capsys, bert):
    no_weights(bert)
    code, _, err = typed(capsys, "models", "shrink", bert, bert, "--layers", "1,3,5")
    assert code == 2
    assert "is there and not empty" in err


def test_a_base_that_is_nowhere_is_one_line(capsys, tmp_path):
    for name in (tmp_path / "nowhere", "builtin:large", "owner/nowhere"):
        code, _, err = typed(capsys, "models", "shrink", name, tmp_path / "out", "--layers", "0")
        assert code == 2
        assert str(name) in err
        assert err.count("\n") == 1


def test_shards_and_bin_files_shrink_too(capsys, tmp_path):
    folder = base(tmp_path / "llama", "LlamaForCausalLM", small._SHAPE | SIX)
    weights = tensors(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    no_weights(folder)
    assert typed(capsys, "models", "shrink", folder, tmp_path / "one", "--layers", "4")[0] == 0
    one = tensors(tmp_path / "one")
    assert torch.equal(one["model.layers.0.mlp.up_proj.weight"], weights["model.layers.4.mlp.up_proj.weight"])
    shutil.rmtree(folder)
    base(folder, "LlamaForCausalLM", small._SHAPE | SIX)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    no_weights(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert typed(capsys, "models", "shrink", folder, tmp_path / "two", "--layers", "4")[0] == 0
    assert all(torch.equal(tensor, one[name]) for name, tensor in tensors(tmp_path / "two").items())
