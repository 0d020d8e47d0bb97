"""What a command was pointed at."""

import json
import shutil

import pytest

from sheepfold import state as states
from sheepfold.answering.source import find
from sheepfold.errors import CheckpointError, ConfigError, ModelError
from sheepfold.journal import RunFolder
from sheepfold.models import load_base


def test_a_run_names_its_base_its_adapters_and_each_clients_own(run):
    source = find(run)
    clients = [f"client:client-{i}" for i in range(4)]
    assert source.names == ("base", "federated", "best", *clients)
    assert (source.default, source.rounds, source.model.base) == ("federated", 2, "builtin:tiny")


def test_an_adapters_hash_is_that_of_the_state_it_came_from(run):
    source = find(run)
    assert source.adapter_hash("federated") == states.load(RunFolder(run).latest).whole().hash()
    assert source.adapter_hash("base") is None
    assert len({source.adapter_hash(name) for name in source.names if name != "best"}) == 6


def test_an_adapters_folder_and_its_weights_file_are_the_same_adapter(run, tmp_path):
    folder = find(run / "adapter")
    assert folder.names == ("base", "adapter")
    assert folder.adapter_hash("adapter") == find(run / "adapter" / "adapter_model.safetensors").adapter_hash("adapter")
    alone = shutil.copy(run / "adapter" / "adapter_model.safetensors", tmp_path / "weights.safetensors")
    config = run / "adapter" / "adapter_config.json"
    told = find(alone, base="builtin:tiny", adapter_config=config)
    assert told.adapter_hash("adapter") == folder.adapter_hash("adapter")


def test_a_base_by_itself_answers_as_base(run):
    assert find("builtin:tiny").names == find(None, base="builtin:tiny").names == ("base",)


def test_the_runs_template_can_be_replaced(run):
    assert find(run, template="alpaca").data.template == "alpaca"


@pytest.mark.parametrize(
    ("place", "over", "error", "words"),
    [
        (None, {}, ConfigError, "name a run's folder"),
        ("adapter/nowhere", {}, CheckpointError, "no such run"),
        ("state", {"base": "builtin:tiny"}, ConfigError, "neither a run's folder nor an adapter's"),
        (".", {"adapter_config": "x.json"}, ConfigError, "no effect"),
    ],
)
def test_a_place_that_is_nothing_is_one_line(run, place, over, error, words):
    with pytest.raises(error, match=words):
        find(run / place if place else None, **over)


def test_an_adapter_without_a_base_asks_for_one(run, tmp_path):
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="--base"):
        find(copy)
    assert find(copy, base="builtin:tiny").default == "adapter"


def test_a_clients_name_is_its_own_however_long_or_odd(run, tmp_path):
    from sheepfold.local.store import folder_name

    copy, odd = shutil.copytree(run, tmp_path / "named"), ["n" * 200, "../up", ".hidden", "Zoë, Ward 7"]
    facts = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(facts | {"clients": {name: {} for name in odd}}))
    for old, new in zip(sorted((copy / "personal").iterdir()), odd, strict=True):
        old.rename(copy / "personal" / folder_name(new))
        assert not folder_name(new).startswith(".")
    source = find(copy)
    assert set(source.names[3:]) == {f"client:{name}" for name in odd}
    assert all(source.adapter_hash(name) for name in source.names[3:])


def test_a_run_without_a_state_says_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "young")
    shutil.rmtree(copy / "state")
    with pytest.raises(CheckpointError, match="no state yet"):
        find(copy)


def test_an_unknown_name_suggests_the_nearest(run):
    with pytest.raises(ConfigError, match="did you mean 'federated'"):
        find(run).check("federatd")
    nowhere = find("./nowhere")
    with pytest.raises(ModelError, match="no such folder"):
        load_base(nowhere.model)
