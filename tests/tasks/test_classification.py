"""Rows with labels: their tokens, their labels' order, and the heads of their bases."""

import json

import pytest
import torch
import transformers

from sheepfold.config import DataSettings, ModelSettings
from sheepfold.data.rows import Message, Record
from sheepfold.errors import ConfigError, DataError, ModelError
from sheepfold.models import config_only, load_base, load_tokenizer
from sheepfold.targets import find_targets
from sheepfold.tasks.classification import Classification, labels_of
from sheepfold.tasks.heads import head_modules
from tests import encoders

TWO = Classification(labels=("bad", "good"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoders.saved(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(ModelSettings(base=str(folder)), TWO)


def tokenized(records, tokenizer, **data):
    return TWO.tokenize(records, tokenizer, DataSettings(**({"max_tokens": 16} | data)), None).rows


def test_a_row_is_what_the_tokenizer_writes_and_its_labels_number(tokenizer):
    records = [Record("w1 w2", "good"), Record("w3", "bad", "w4 w5")]
    rows = tokenized(records, tokenizer)
    for i, texts in enumerate((("w1 w2",), ("w3", "w4 w5"))):
        written = tokenizer(*texts)
        assert rows.row(i)[0].tolist() == [*written["input_ids"], 1 - i]
        assert rows.prompt_tokens[i] == written["token_type_ids"].count(0)
    assert rows.target_tokens().tolist() == [1, 1]


@pytest.mark.parametrize(("cut", "kept"), [("right", ["w0", "w1"]), ("left", ["w8", "w9"])])
def test_a_long_row_keeps_its_special_tokens_and_its_label_and_is_counted(tokenizer, cut, kept):
    records = [Record(" ".join(f"w{i}" for i in range(10)), "good"), Record("w1", "bad")]
    rows = tokenized(records, tokenizer, max_tokens=4, cut=cut)
    assert tokenizer.convert_ids_to_tokens(rows.row(0)[0][:-1]) == ["[CLS]", *kept, "[SEP]"]
    assert rows.row(0)[0][-1] == 1
    assert rows.cut.tolist() == [True, False]
    again = tokenized(records, tokenizer)  # the tokenizer is as it was
    assert not again.cut.any()


def test_a_long_pair_is_shortened_where_it_is_longest(tokenizer):
    rows = tokenized([Record(" ".join(["w1"] * 9), "good", "w2 w3")], tokenizer, max_tokens=8)
    tokens = tokenizer.convert_ids_to_tokens(rows.row(0)[0][:-1])
    assert tokens == ["[CLS]", "w1", "w1", "w1", "[SEP]", "w2", "w3", "[SEP]"]


def test_tokens_are_found_in_the_cache_and_other_labels_are_other_tokens(tokenizer, tmp_path):
    records, data = [Record("w1", "good"), Record("w2", "bad")], DataSettings(max_tokens=16)
    first = TWO.tokenize(records, tokenizer, data, tmp_path)
    second = TWO.tokenize(records, tokenizer, data, tmp_path)
    other = Classification(labels=("good", "bad")).tokenize(records, tokenizer, data, tmp_path)
    assert (first.from_cache, second.from_cache, other.from_cache) == (False, True, False)
    assert second.rows.row(0)[0].tolist() == first.rows.row(0)[0].tolist() != other.rows.row(0)[0].tolist()


def test_labels_are_as_told_or_as_the_named_set_numbers_them_or_sorted():
    records = [Record("a", "10"), Record("b", "9"), Record("c", "9")]
    assert labels_of(DataSettings(source="x.csv"), records) == ("9", "10")
    assert labels_of(DataSettings(source="x.csv", labels=("10", "9")), records) == ("10", "9")
    assert labels_of(DataSettings(source="cola"), records) == ("unacceptable", "acceptable")
    with pytest.raises(DataError, match=r"1 different outputs in 1 rows, and task classification takes 2 to"):
        labels_of(DataSettings(source="x.csv"), records[:1])


def test_rows_that_cannot_be_labelled_are_refused_by_number(tokenizer):
    with pytest.raises(DataError, match=r"record 1: the label 'goood'; did you mean 'good'\?"):
        tokenized([Record("w1", "good"), Record("w1", "goood")], tokenizer)
    turns = (Message("user", "w1"), Message("assistant", "good"))
    with pytest.raises(DataError, match=r"record 0: is a conversation"):
        tokenized([Record("w1", "good", messages=turns)], tokenizer)
    with pytest.raises(DataError, match=r"data.max_tokens 3: the tokenizer's special tokens alone"):
        tokenized([Record("w1 w2", "good", "w3 w4")], tokenizer, max_tokens=3)


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("bert", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("roberta", ["classifier"]),
        ("deberta-v2", ["pooler", "classifier"]),
        ("modernbert", ["head", "classifier"]),
    ],
)
def test_a_head_is_what_stands_beside_the_encoder_and_no_target_of_lora(family, modules):
    model = encoders.model(family=family)
    assert list(head_modules(model)) == modules
    everywhere = find_targets(model, "all-linear", head_modules(model))
    assert everywhere
    assert not any(name.split(".")[0] in modules for name in everywhere)
    assert find_targets(model, "auto", head_modules(model)).keys() < everywhere.keys()


def test_modules_to_save_name_more_or_other_modules():
    model = encoders.model()
    assert list(head_modules(model, ["classifier", "pooler"])) == ["bert.pooler", "classifier"]
    with pytest.raises(ModelError, match=r"adapter.modules_to_save: 'clasifier' matches no module; did you mean"):
        head_modules(model, ["clasifier"])
    with pytest.raises(ModelError, match=r"'classifier' matches classifier alone, which is trained whole"):
        find_targets(model, ("query", "classifier"), head_modules(model))


def load(folder, **task):
    return load_base(
        ModelSettings(base=str(folder)), "cpu", task=Classification(**({"labels": TWO.labels} | task))
    ).model


def test_a_new_head_follows_the_seed_and_leaves_torchs_own_generator_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load(folder, seed=1)
    assert torch.rand(1) == expected
    second, other = load(folder, seed=1), load(folder, seed=2)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not first.classifier.bias.any()
    assert first.config.id2label == {0: "bad", 1: "good"}
    assert config_only(ModelSettings(base=str(folder)), "cpu", TWO).model.classifier.weight.shape == (2, 32)


def test_a_bases_own_head_is_kept_where_it_knows_the_same_labels(tmp_path):
    folder = encoders.saved(tmp_path, head=True)  # LABEL_0, LABEL_1
    own = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(load(folder).classifier.weight, own.classifier.weight)
    assert not torch.equal(load(folder, new_head=True).classifier.weight, own.classifier.weight)
    assert load(folder, new_head=True, labels=encoders.LABELS).classifier.weight.shape == (3, 32)
    with pytest.raises(
        ModelError, match=r"its head gives LABEL_0, LABEL_1, and the data's labels are bad, good, neither"
    ):
        load(folder, labels=encoders.LABELS)


def test_a_tensor_missing_elsewhere_is_refused_and_can_be_drawn_by_name(tmp_path):
    folder = encoders.saved(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack bert.pooler.dense.bias.*modules_to_save \[classifier, bert.pooler"):
        load(folder)
    assert load(folder, modules=("classifier", "pooler")).bert.pooler.dense.weight.std() > 0
    save_file({n: t for n, t in kept.items() if "layer.1" not in n}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack \d+ tensors"):
        load(folder)


def test_a_decoder_is_no_base_for_it_and_an_encoder_none_for_answers(folder):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is not an encoder that task classification"):
        config_only(ModelSettings(), "cpu", TWO)
    with pytest.raises(ModelError, match=r"is not a causal language model"):
        config_only(ModelSettings(base=str(folder)), "cpu")


def test_robertas_positions_begin_behind_its_padding_id(tmp_path):
    name, config = encoders.FAMILIES["roberta"]
    made = getattr(transformers, name).config_class(**config)
    (tmp_path / "config.json").write_text(json.dumps(made.to_dict()))
    assert config_only(ModelSettings(base=str(tmp_path)), "cpu", TWO).max_positions == 64 - 2


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"data.template": "alpaca"}, r"data.template has no effect with task classification"),
        ({"data.train_on_inputs": True}, r"data.train_on_inputs has no effect"),
        ({"task": "causal_lm", "data.labels": ["a", "b"]}, r"data.labels has no effect with task causal_lm"),
        ({"task": "causal_lm", "model.head": "new"}, r"model.head has no effect with task causal_lm"),
    ],
)
def test_an_option_without_effect_is_refused(over, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        encoders.experiment(tmp_path, **over)
