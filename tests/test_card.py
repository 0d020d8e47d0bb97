"""A model card says what the run's folder says, in front matter that the hub reads, and names no client."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from sheepfold import simulation
from sheepfold.card import Card, stated_license
from sheepfold.config import CardSettings
from sheepfold.export import export, write_cards
from sheepfold.journal import RunFolder
from sheepfold.peft_io import read_peft
from tests import runs, small

SAID = {"license": "Ward licence 2", "data_license": "cc-by-4.0", "authors": ["The ward"], "intended_use": "Replies."}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a closing table, adapters of clients' own and a best evaluation."""
    folder = tmp_path_factory.mktemp("card")
    base = small.saved(folder / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A base\n")
    over = {"model": {"base": str(base)}, "baselines": ["local"], "card": SAID, "stop.key": "loss.plain"}
    over |= {"federation.strategy": "fedprox", "federation.strategy_args": {"mu": 0.5}, "personal.finetune_steps": 1}
    with small.one_thread():
        return simulation.run(runs.experiment(folder, **over)).folder


def rows(card: str) -> dict[str, list[str]]:
    """Return the cells of every table row by its first one."""
    lines = [line.strip("|").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_run_ends_with_a_card_of_its_figures(run):
    card = (run / "model_card.md").read_text()
    lines, data, found = RunFolder(run).lines(), RunFolder(run).data(), rows((run / "model_card.md").read_text())
    up = sum(line.get("uplink_bytes", 0) for line in lines)
    assert "federated with sheepfold: fedprox, 2 rounds" in card
    assert f"({up:,} bytes)" in found["sent up"][0]
    assert found["clients"] == ["4, 4 of them took part"]
    assert found["strategy"] == ["fedprox (mu 0.5)"]
    assert found["weights in the fold"] == ["rows"]
    assert found["weighted"] == [f"{lines[n]['held_out']['loss']['weighted']:.4f}" for n in (0, -1)]
    assert found["data fingerprint"] == [data["fingerprint"]]
    experiment = hashlib.sha256((run / "experiment.yaml").read_bytes()).hexdigest()
    assert found["experiment (sha256 of experiment.yaml)"] == [experiment]
    assert found["adapter hash"] == [read_peft(run / "adapter").hash()] == [lines[-1]["adapter"]]
    closing = json.loads((run / "closing.json").read_text())["scores"]["loss"]
    own = [who["personal"] for name, who in closing.items() if name != "shared"]
    assert found["loss, own rows"][-1] == f"{sum(own) / len(own):.4f}"
    assert "No differential privacy" in card
    assert (run / "adapter" / "README.md").read_text() == card.replace('"adapter")', '"this folder")')


def test_no_card_names_a_client(run):
    for card in [run / "model_card.md", *run.glob("*/README.md"), *run.glob("personal/*/README.md")]:
        assert "client-0" not in card.read_text(), card


def test_a_clients_own_adapter_has_a_card_of_its_own(run):
    folder = next(run.glob("personal/*"))
    card = (folder / "README.md").read_text()
    assert "It is the adapter of one client, its own." in card
    assert rows(card)["adapter hash"] == [read_peft(folder).hash()]


def test_the_front_matter_is_the_hubs(run):
    card = ModelCard.load(run / "model_card.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert (card.data.license, card.data.license_name) == ("other", "Ward licence 2")
    assert "federated-learning" in card.data.tags
    plain = ModelCard(Card("owner/base", "x", "fedavg", 3, said=CardSettings(license="mit")).text("adapter", ""))
    assert (plain.data.license, plain.data.base_model, plain.data.base_model_relation) == (
        "mit",
        "owner/base",
        "adapter",
    )


def test_licences_are_what_somebody_stated(run, tmp_path):
    found = rows((run / "model_card.md").read_text().partition("## This export")[0])
    assert (found["adapter"], found["base"], found["training data"]) == (["Ward licence 2"], ["mit"], ["cc-by-4.0"])
    assert stated_license("builtin:tiny") == "apache-2.0"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert stated_license(str(tmp_path)) is None
    assert Card(str(tmp_path), "x").licences() == dict.fromkeys(("adapter", "base", "training data"), "not stated")


def test_an_export_says_what_was_measured_since(run, tmp_path):
    (run / "eval").mkdir(exist_ok=True)
    metrics = {"gsm8k": {"metrics": {"exact_match": {"value": 0.125, "stderr": None}}, "rows": 8}}
    held = {"federated": {"hash": "x", "results": metrics}, "client:client-0": {"hash": "y", "results": metrics}}
    (run / "eval" / "gsm8k.json").write_text(json.dumps({"tasks": ["gsm8k"], "adapters": held}))
    out = export(run, tmp_path / "out", best=True)
    found = rows((out / "README.md").read_text())
    assert found["gsm8k"] == ["exact_match", "0.1250", "federated"]
    assert "its best evaluation" in (out / "README.md").read_text()
    write_cards(RunFolder(run))
    assert "gsm8k" in (run / "model_card.md").read_text()


def test_files_that_are_no_results_of_ours_do_not_stop_a_card(run):
    (run / "eval").mkdir(exist_ok=True)
    foreign = {
        "half.json": "{bad",
        "list.json": "[1]",
        "old.json": json.dumps({"tasks": ["x"], "adapters": {"federated": {}}}),
        "lm.json": json.dumps(
            {"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "arc_easy"}}}
        ),
    }
    for name, content in foreign.items():
        (run / "eval" / name).write_text(content)
    write_cards(RunFolder(run))
    for name in foreign:
        (run / "eval" / name).unlink()
    assert rows((run / "model_card.md").read_text())["arc_easy"] == ["acc", "0.5000", "not stated"]


@pytest.mark.parametrize(
    ("method", "tag"),
    [("LoRA", "lora"), ("ia3", "ia3"), ("prefix_tuning", "prefix-tuning"), ("full", "full-fine-tuning")],
)
def test_a_cards_first_tag_is_the_method(method, tag):
    card = ModelCard(Card("owner/base", "x", "fedavg", 3, kind=method).text("adapter", ""))
    assert card.data.tags == [tag, "sheepfold", "federated-learning"]


def test_an_export_onto_another_base_names_that_base(run, tmp_path):
    other = small.saved(tmp_path / "other")
    out = export(run, tmp_path / "peft", base=str(other), best=True)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(other)
    card = (out / "README.md").read_text()
    assert f"adapter of `{other}`" in card
    assert str(other) in card.partition("```python")[2].partition("```")[0]
    assert rows(card)["base"][0].startswith(RunFolder(run).experiment().model.base)  # what it was trained on


@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_merging_into_weights_that_a_run_was_not_trained_on_is_said(run, tmp_path, to):
    said, same = [], shutil.copytree(RunFolder(run).experiment().model.base, tmp_path / "same")
    card = (export(run, tmp_path / "same-out", to=to, base=str(same), say=said.append) / "README.md").read_text()
    assert (said, "base weights" in rows(card)) == ([], False)
    other = shutil.copytree(same, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    card = (export(run, tmp_path / "out", to=to, base=str(other), say=said.append) / "README.md").read_text()
    assert "not known to be those that the run was trained on" in rows(card)["base weights"][0]
    assert len(said) == 1
    assert RunFolder(run).data()["base"] in said[0]


def test_an_adapter_without_its_run_says_so(run, tmp_path):
    base = RunFolder(run).experiment().model.base
    out = export(run / "adapter", tmp_path / "merged", to="merged", base=base)
    card = (out / "README.md").read_text()
    assert "How it was trained is not stated." in card
    assert "federated-learning" not in card
    assert Path(out, "model.safetensors").is_file()
