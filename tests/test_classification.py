"""Whole runs of task classification: both engines, resume, baselines, methods, and what leaves a run."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sheepfold import simulation
from sheepfold import state as states
from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from sheepfold.assembly import assemble
from sheepfold.data import doctor
from sheepfold.errors import ConfigError, ModelError
from sheepfold.export import export
from sheepfold.forecast import forecast
from tests import encoders, small
from tests.marks import mostly_slow


@pytest.fixture(autouse=True)
def one_thread():
    with small.one_thread():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("classification")


def lines(outcome):
    return [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(place):
    """A run that learns: the label follows from the first word."""
    over = {"train.epochs": 6, "train.steps": None, "train.lr": 3e-3, "adapter.targets": "all-linear"}
    with small.one_thread():
        return simulation.run(
            encoders.experiment(
                place, **over, baselines=["local", "centralised"], **{"evaluation.metrics": ["matthews"]}
            )
        )


def test_a_run_learns_and_its_journal_has_accuracy_and_matthews_at_every_evaluation(finished):
    journal = lines(finished)
    assert journal[-1]["held_out"]["loss"]["weighted"] < journal[0]["held_out"]["loss"]["weighted"]
    for line in journal:
        held_out = line["held_out"]
        rows = json.loads((finished.folder / "data.json").read_text())["clients"]
        right = sum(held_out["clients_accuracy"][c] * rows[c]["eval"] for c in rows)
        assert held_out["accuracy"]["weighted"] == pytest.approx(right / sum(n["eval"] for n in rows.values()))
        assert -1 <= held_out["matthews"]["weighted"] <= 1
    head = finished.state.adapter.extra
    assert sorted(head) == ["classifier.bias", "classifier.weight"]
    assert 0 < journal[1]["uplink_bytes"] - 4 * finished.state.adapter.nbytes() < 4 * 4096, "numbers and heads"


def test_the_closing_table_compares_by_every_measure(finished):
    closing = finished.closing
    assert list(closing.scores) == ["loss", "accuracy", "matthews"]
    assert set(closing.scores["accuracy"]["shared"]) >= {"base", "federated", "centralised", "local:client-0"}
    assert closing.scores["accuracy"]["shared"]["federated"] == pytest.approx(
        lines(finished)[-1]["held_out"]["accuracy"]["weighted"]
    )


@pytest.fixture(scope="module")
def texts(finished):
    base = finished.folder.parents[1] / "base"
    return AutoTokenizer.from_pretrained(base)(["w1 w2 w3", "w4 w5"], padding=True, return_tensors="pt")


def plain_logits(finished, texts):
    """The logits of base and adapter, by hooks of the test's own and the head's numbers."""
    base = AutoModelForSequenceClassification.from_pretrained(finished.folder.parents[1] / "base").eval()
    adapter = finished.adapter
    base.load_state_dict(dict(adapter.extra), strict=False)
    for path, pair in adapter.pairs.items():

        def add(_module, args, out, pair=pair):
            return out + pair.scale * (args[0] @ pair.A.T @ pair.B.T)

        base.get_submodule(path).register_forward_hook(add)
    with torch.no_grad():
        return base(**texts).logits


def test_plain_peft_gives_the_evaluated_logits_and_the_card_says_how(finished, texts):
    from peft import PeftModel

    card = (finished.folder / "adapter" / "README.md").read_text()
    assert "num_labels=2, id2label={0: 'bad', 1: 'good'}" in card
    base = AutoModelForSequenceClassification.from_pretrained(finished.folder.parents[1] / "base", num_labels=2)
    model = PeftModel.from_pretrained(base, finished.folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**texts).logits, plain_logits(finished, texts), atol=1e-5, rtol=1e-4)


def test_a_merged_export_needs_nothing_but_transformers(finished, texts, tmp_path):
    export(finished.folder, tmp_path / "merged", to="merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    with torch.no_grad():
        torch.testing.assert_close(model(**texts).logits, plain_logits(finished, texts), atol=1e-5, rtol=1e-4)
    export(finished.folder, tmp_path / "alone")
    one, other = (
        (folder / "adapter_config.json").read_text() for folder in (finished.folder / "adapter", tmp_path / "alone")
    )
    assert one == other


def test_a_run_goes_on_from_a_classifiers_folder(finished, place):
    start = str(finished.folder / "adapter")
    over = {"adapter.targets": "all-linear", "adapter.start": start, "federation.rounds": 1, "name": "on"}
    outcome = simulation.run(encoders.experiment(place, **over))
    before, after = lines(finished)[-1]["held_out"], lines(outcome)[0]["held_out"]
    assert after["clients_accuracy"] == before["clients_accuracy"]
    with pytest.raises(ModelError, match=r"adapter.start .*: bert.pooler.dense.bias is trained whole in one of"):
        simulation.run(encoders.experiment(place, **over | {"adapter.modules_to_save": ["pooler", "classifier"]}))


def test_a_run_of_classifiers_has_no_answers(finished):
    with pytest.raises(ConfigError, match=r"a run of task classification gives labels"):
        open_source(find(finished.folder))
    with pytest.raises(ConfigError, match=r"a classifier's adapter \(task_type SEQ_CLS\) gives labels"):
        find(finished.folder / "adapter")


def test_both_engines_run_the_same_experiment_to_the_same_adapter(place):
    over = {"model.dtype": "float64", "federation.rounds": 2}
    runs = [
        simulation.run(encoders.experiment(place, **over, **{"train.engine": engine, "name": engine}))
        for engine in ("cohort", "peft_model")
    ]
    assert small.gap(runs[0].state.adapter, runs[1].state.adapter) < 1e-5  # the adapter itself is float32
    for one, other in zip(*map(lines, runs), strict=True):
        assert one["held_out"]["accuracy"] == other["held_out"]["accuracy"]


@pytest.mark.parametrize("engine", ["cohort", "peft_model"])
def test_resuming_repeats_the_uninterrupted_run(place, engine):
    name, over = f"resumed-{engine}", {"train.engine": engine, "keep_rounds": 1, "federation.strategy": "scaffold"}
    over |= {"train.optimizer": "sgd"}
    whole = simulation.run(encoders.experiment(place, name=name, **over))
    again = simulation.run(encoders.experiment(place, name=name, **over), resume_from=1)
    assert again.state.hash() == whole.state.hash()


METHODS = {
    "fedavg": {},
    "fedit": {},
    "fedprox": {"federation.strategy_args": {"mu": 0.1}},
    "fedadam": {},
    "fedavgm": {},
    "scaffold": {"train.optimizer": "sgd"},
    "flora": {"adapter.ranks": [2, 4], "adapter.rank": 8},
    "fedex": {},
    "flexlora": {"adapter.ranks": [2, 4], "adapter.rank": 8},
    "hetlora": {"adapter.ranks": [2, 4], "adapter.rank": 8},
    "heterolora": {"adapter.ranks": [2, 4], "adapter.rank": 8},
    "ffa_lora": {},
    "rolora": {},
    "fedsa": {},
}


@pytest.mark.parametrize("name", mostly_slow(METHODS, quick=["fedavg", "scaffold", "flexlora", "fedsa", "flora"]))
def test_a_method_trains_pairs_and_heads_and_the_engines_agree(name, place):
    ends = []
    for engine in ("cohort", "peft_model"):
        over = METHODS[name] | {"federation.strategy": name, "name": name, "train.engine": engine}
        outcome = simulation.run(encoders.experiment(place, **over, **{"evaluation.every": 0}))
        ends.append(outcome.state)
    first = states.load(outcome.folder / "state" / "latest.safetensors")
    assert first.adapter.extra.keys() == {"classifier.weight", "classifier.bias"}
    assert first.adapter.extra["classifier.bias"].abs().sum() > 0
    assert small.gap(ends[0].whole(), ends[1].whole()) < 1e-4


def test_the_head_is_the_weighted_mean_of_the_clients_heads(place):
    parts = assemble(encoders.experiment(place, **{"train.epochs": 1, "train.steps": None}))
    state = parts.start()
    updates = list(parts.engine.train([parts.strategy.assign(state, c, 1e-2) for c in parts.data.clients]))
    folded = parts.strategy.fold(state, iter(updates))
    weights = np.array([len(rows.train) for rows in parts.data.clients.values()], dtype=float)
    heads = torch.stack([u.adapter.extra["classifier.weight"].double() for u in updates])
    expected = (torch.from_numpy(weights / weights.sum())[:, None, None] * heads).sum(0)
    torch.testing.assert_close(folded.adapter.extra["classifier.weight"].double(), expected, atol=1e-7, rtol=1e-6)
    parts.engine.close()


@pytest.mark.parametrize("name", ["fed_sb", "slora"])
def test_a_method_without_a_place_for_heads_says_so(name, place):
    with pytest.raises(ConfigError, match=rf"strategy .*{name}.*: it trains something else than LoRA's A and B"):
        simulation.run(encoders.experiment(place, **{"federation.strategy": name, "federation.rounds": 9}))


def test_full_fine_tuning_trains_all_and_saves_a_classifier(place):
    over = {"adapter.method": "full", "train.engine": "peft_model", "name": "full", "federation.rounds": 1}
    outcome = simulation.run(encoders.experiment(place, **over))
    assert "bert.embeddings.word_embeddings.weight" in outcome.state.adapter.extra
    model = AutoModelForSequenceClassification.from_pretrained(outcome.folder / "adapter")
    torch.testing.assert_close(model.classifier.weight, outcome.state.adapter.extra["classifier.weight"])
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_heads_can_stay_at_home(place):
    outcome = simulation.run(encoders.experiment(place, name="home", **{"personal.keep_local": ["classifier"]}))
    head, fresh = outcome.state.adapter.extra, assemble(encoders.experiment(place)).initial.extra
    assert torch.equal(head["classifier.weight"], fresh["classifier.weight"])
    numbers = 4 * (outcome.state.adapter.nbytes() - 4 * (2 * 32 + 2))
    assert 0 < lines(outcome)[1]["uplink_bytes"] - numbers < 4 * 4096
    assert (outcome.folder / "personal" / "client-0" / "adapter_config.json").is_file()


def test_early_stopping_keeps_the_highest_accuracy(place):
    over = {"stop.key": "accuracy.weighted", "stop.patience": 1, "federation.rounds": 4, "train.lr": 1e-7}
    outcome = simulation.run(encoders.experiment(place, name="stopped", **over))
    assert outcome.stopped_early
    assert outcome.state.best.value == max(line["held_out"]["accuracy"]["weighted"] for line in lines(outcome))
    with pytest.raises(ConfigError, match=r"stop.key 'matthews.weighted': known: loss.weighted.*accuracy.weighted"):
        simulation.run(encoders.experiment(place, **{"stop.key": "matthews.weighted"}))


def test_plan_counts_pairs_and_head_and_their_bytes(place, finished):
    foreseen = forecast(encoders.experiment(place, **{"adapter.targets": "all-linear"}))
    assert foreseen.adapter_numbers == sum(t.numel() for t in finished.state.adapter.tensors().values())
    assert foreseen.uplink_bytes == lines(finished)[1]["uplink_bytes"]


def test_the_doctor_shows_the_sentence_and_the_labels_name(place):
    parts = assemble(encoders.experiment(place))
    report = doctor.examine(parts.data, parts.base.tokenizer)
    parts.engine.close()
    (given, learned), (label, is_learned) = report.example
    assert (given.split()[0], learned) == ("[CLS]", False)
    assert (label.strip() in ("bad", "good"), is_learned) == (True, True)
    assert report.total().target_tokens == len(parts.data.records)


def test_pairs_of_sentences_run_and_other_measures_are_refused(place):
    over = {"name": "pairs", "federation.rounds": 1}
    experiment = encoders.experiment(place, **over)
    encoders.rows(place, paired=True)
    outcome = simulation.run(experiment)
    parts = assemble(experiment)
    parts.engine.close()
    tokens = parts.data.tokens
    assert (tokens.prompt_tokens < tokens.lengths() - 1).all()
    assert outcome.state.round == 1
    with pytest.raises(ConfigError, match=r"no 'rouge_l' with task classification; known: accuracy, f1, matthews"):
        simulation.run(encoders.experiment(place, **{"evaluation.metrics": ["rouge_l"]}))
