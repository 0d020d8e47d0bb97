"""The experiment file: whatever is wrong with it is one line before anything heavy loads."""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.config import Experiment, build, dump, json_schema, load
from sheepfold.errors import ConfigError


def test_the_defaults_are_a_whole_experiment():
    assert build({}) == Experiment()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**40),
            "name": st.sampled_from(["a", "größe", "run 7"]),
            "train": st.fixed_dictionaries({"lr": st.floats(1e-9, 1.0), "steps": st.integers(1, 99)}),
            "adapter": st.fixed_dictionaries({"targets": st.lists(st.sampled_from(["q_proj", "k_proj"]), min_size=1)}),
            "baselines": st.lists(st.sampled_from(["local", "centralised"])),
        },
    )
)
def test_an_experiment_written_down_is_the_experiment(values):
    experiment = build(values)
    assert build(yaml.safe_load(dump(experiment))) == experiment


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stepz": 3}}, "unknown key 'train.stepz'; did you mean 'steps'?"),
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"lr": "fast"}}, "train.lr: found 'fast'; input should be a valid number"),
        ({"train": {"lr": 0}}, "train.lr: found 0; input should be greater than 0"),
        ({"train": {"lr": float("inf")}}, "train.lr: found inf"),
        ({"train": {"steps": 3, "epochs": 1}}, "train: steps 3 and epochs 1 are both set; keep one of them"),
        ({"train": {"micro_rows": 9, "batch_rows": 8}}, "micro_rows 9 is more than batch_rows 8"),
        ({"train": {"steps": 3, "warmup_steps": 3}}, "warmup_steps 3 must be less than steps 3"),
        ({"train": {"engine": "trainer"}}, "input should be 'auto', 'cohort', 'peft_model'"),
        ({"train": {"local_rule_args": {"mu": 1}}}, "no effect without local_rule"),
        ({"data": {"eval_share": 0.6, "test_share": 0.5}}, "leaves no training rows"),
        ({"data": {"partition": {"clients": 0}}}, "data.partition.clients: found 0"),
        ({"data": {"cut": "middle"}}, "input should be 'right' or 'left'"),
        ({"federation": {"clients_per_round": 11}}, "clients_per_round 11 is more than data.partition.clients 10"),
        ({"federation": {"clients_per_round": 2, "fraction": 0.1}}, "both set; keep one of them"),
        ({"federation": {"fraction": 1.5}}, "federation.fraction: found 1.5"),
        ({"federation": 3}, "federation: found 3"),
        ({"adapter": {"method": "ia3"}, "train": {"engine": "cohort"}}, "needs train.engine peft_model"),
        ({"adapter": {"options": {"r": 3}}}, "adapter.options has no effect"),
        ({"adapter": {"dropout": 1.0}}, "adapter.dropout: found 1.0"),
        ({"stop": {"key": "loss.weighted"}, "evaluation": {"every": 0}}, "stop.key needs evaluations"),
        ({"name": "a/b"}, "must be a plain folder name"),
        ({"baselines": ["alone"]}, "input should be 'local' or 'centralised'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_the_key_and_a_way_on(values, message):
    with pytest.raises(ConfigError) as error:
        build(values, source="my.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("my.yaml: ")
    assert "\n" not in str(error.value)


def test_a_shipped_recipe_goes_by_its_name():
    assert load("demo") == load(None)
    assert load("shepherd-dolly").name == "shepherd-dolly"
    with pytest.raises(ConfigError, match="no recipe of that name; did you mean 'shepherd-dolly'"):
        load("sheperd-dolly")


def test_what_is_no_mapping_is_refused_in_python_too():
    with pytest.raises(ConfigError, match="expected a mapping of options, found a list"):
        build([1])  # type: ignore[arg-type]


def test_overrides_are_yaml_and_reach_any_depth(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("train: {lr: 0.1}\n")
    experiment = load(path, ["train.lr=1e-3", "data.partition.by=shards", "baselines=[local]", "cache=null"])
    assert experiment.train.lr == 1e-3
    assert experiment.data.partition.by == "shards"
    assert experiment.baselines == ("local",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "expected key.path=value"),
        ("seed.x=1", "holds a value, not a section"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path, override, message):
    path = tmp_path / "e.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load(path, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "not valid YAML"),
        (b"- a\n- b\n", "expected `key: value` lines"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_experiment_is_one_line(tmp_path, content, message):
    path = tmp_path / "e.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_the_schema_accepts_what_we_accept_and_refuses_unknown_keys():
    import jsonschema

    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    assert check.is_valid(json.loads(json.dumps(yaml.safe_load(dump(Experiment())))))
    assert not check.is_valid({"trian": {}})
    assert not check.is_valid({"train": {"lr": "fast"}})


def test_every_option_says_what_it_means():
    assert len(json_schema()["$defs"]) > 5
    for name, section in json_schema()["$defs"].items():
        for key, option in section["properties"].items():
            assert "$ref" in option or option.get("description"), f"{name}.{key}"


def test_reading_an_experiment_imports_nothing_heavy():
    code = "import sys, sheepfold; sheepfold.load(None); print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(("method", "engine"), [("lora", "cohort"), ("full", "peft_model"), ("dora", "peft_model")])
def test_the_engine_auto_is_the_method_s_and_written_down_as_it_is(method, engine):
    values = {"adapter": {"method": method}}
    for train in ({}, {"engine": "auto"}, {"lr": 0.1}):
        made = build({**values, "train": train})
        assert made.train.engine == engine
        assert made.train.lr == train.get("lr", build({}).train.lr)
        assert yaml.safe_load(dump(made))["train"]["engine"] == engine
        assert build(yaml.safe_load(dump(made))) == made
    assert build({**values, "train": {"engine": "peft_model"}}).train.engine == "peft_model"


def test_the_engine_auto_follows_an_override_of_the_method():
    assert load(None, ["adapter.method=full"]).train.engine == "peft_model"
    assert load(None, ["adapter.method=full", "adapter.method=lora"]).train.engine == "cohort"
