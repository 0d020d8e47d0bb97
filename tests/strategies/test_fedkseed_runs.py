"""Whole runs of FedKSeed: what they leave behind, how they resume, what they foresee, and what they refuse."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sheepfold import simulation
from sheepfold.assembly import assemble, check
from sheepfold.config import Experiment, build, dump
from sheepfold.errors import ConfigError
from sheepfold.forecast import forecast
from tests import encoders, runs, small

SEEDS_ALONE = {"adapter": {"method": "seeds", "options": {"candidates": 64}}, "federation.strategy": "fedkseed"}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.quick():
        yield


def a_run(folder: Path, classifies: bool = False, **over) -> Experiment:
    train = {"train.lr": 1e-3, "federation.clients_per_round": 3}
    if classifies:
        return encoders.experiment(folder, **{**SEEDS_ALONE, **train, **over})
    if not (folder / "base").is_dir():
        small.saved(folder / "base")
    base = {"model.base": str(folder / "base"), "data.rows": 40}
    return runs.experiment(folder, **{**SEEDS_ALONE, **train, **base, **over})


def journal(outcome: simulation.Outcome) -> list[dict]:
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in runs.MEASURED} for line in lines]


def test_auto_stands_for_its_engine_and_its_steps_and_the_file_says_so(tmp_path):
    made = a_run(tmp_path)
    assert (made.train.engine, made.train.optimizer, made.train.grad_norm) == ("zeroth_order", "sgd", None)
    assert build(json.loads(json.dumps(made.model_dump(mode="json")))) == made
    assert "zeroth_order" in dump(made)
    assert a_run(tmp_path, **{"train.grad_norm": 3.0}).train.grad_norm == 3.0
    assert build({"adapter": {"method": "ia3"}}).train.optimizer == "adamw"


@pytest.mark.parametrize("pro", [False, True])
def test_a_run_resumes_to_the_same_bits(tmp_path, pro):
    over = {"federation.rounds": 3, "keep_rounds": 1, "federation.strategy_args": {"probabilities": pro}}
    whole = simulation.run(a_run(tmp_path, **over))
    before = {p.name: p.read_bytes() for p in (whole.folder / "state").glob("*.safetensors")}
    lines = journal(whole)
    again = simulation.run(a_run(tmp_path, **over), resume_from=1)
    assert journal(again) == lines
    assert {p.name: p.read_bytes() for p in (again.folder / "state").glob("*.safetensors")} == before
    assert 0 < lines[-1]["uplink_bytes"] - 3 * 2 * 6 < 3 * 1200, "two steps' candidates and scalars, and a head"
    assert 0 < lines[-1]["downlink_bytes"] - 3 * (64 * 4 + (2 * 2 if pro else 0)) < 3 * 1200
    assert not any(line["absent"] for line in lines[1:])


def test_the_exported_model_is_the_evaluated_one(tmp_path):
    over = {"baselines": ["local", "centralised"], "evaluation.metrics": ["exact_match"]}
    over |= {"evaluation.generation": {"max_new_tokens": 3}, "personal.finetune_steps": 1}
    outcome = simulation.run(a_run(tmp_path, **over))
    parts = assemble(a_run(tmp_path, **over))
    parts.engine.carrier.write(outcome.adapter)
    ours = parts.engine.carrier.model
    theirs = AutoModelForCausalLM.from_pretrained(outcome.folder / "adapter")
    assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in ours.named_parameters())
    assert {"base", "federated", "centralised"} < outcome.closing.scores["loss"]["shared"].keys()
    assert len(list((outcome.folder / "personal").iterdir())) == 4
    assert "zeroth" in (outcome.folder / "experiment.yaml").read_text()


def test_loss_falls_and_the_head_with_it(tmp_path):
    train = {"train.steps": 20, "train.batch_rows": 16, "train.lr": 3e-3, "train.grad_norm": 1.0}
    outcome = simulation.run(a_run(tmp_path, True, **train, **{"federation.rounds": 4, "evaluation.every": 4}))
    lines = journal(outcome)
    before, after = (lines[i]["held_out"]["loss"]["weighted"] for i in (0, -1))
    assert after < before - 0.3
    model = AutoModelForSequenceClassification.from_pretrained(outcome.folder / "adapter")
    assert model.config.num_labels == 2


def test_a_plan_foresees_its_bytes_and_memory(tmp_path):
    made = a_run(tmp_path, **{"federation.strategy_args": {"probabilities": True}})
    foreseen, line = forecast(made), journal(simulation.run(made))[1]
    assert foreseen.downlink_bytes == line["downlink_bytes"]
    assert foreseen.uplink_bytes == line["uplink_bytes"]
    assert foreseen.adapter_numbers == 64
    assert foreseen.plan.clients_per_pass == 1
    assert foreseen.pass_bytes == pytest.approx(2 * 4 * foreseen.base_parameters, rel=0.01)


def refused(over: Mapping[str, object], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        check(a_run(tmp_path, **over))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("over", "why"),
    [
        ({"adapter": {"method": "full"}}, "trains all weights through seeds, and adapter.method is 'full'"),
        ({"federation.strategy": "fedavg"}, "strategy fedavg: adapter.method seeds goes with fedkseed alone"),
        ({"federation.strategy": ["fedadam", "fedkseed"]}, "seeds goes with fedkseed alone"),
        ({"train.engine": "cohort"}, "'seeds' needs train.engine zeroth_order, found cohort"),
        ({"train.engine": "peft_model"}, "'seeds' needs train.engine zeroth_order, found peft_model"),
        ({"adapter": {}, "train.engine": "zeroth_order"}, "'lora' needs train.engine cohort, found zeroth_order"),
        ({"train.schedule": "linear"}, "train.schedule: .* learning rate is constant"),
        ({"train.round_schedule": "cosine"}, "train.round_schedule: .* learning rate is constant"),
        ({"train.warmup_steps": 1}, "train.warmup_steps: .* learning rate is constant"),
        ({"train.weight_decay": 0.1}, "train.weight_decay: .* no gradient"),
        ({"train.optimizer_args": {"momentum": 0.9}}, "train.optimizer_args: .* no gradient"),
        ({"train.local_rule": "proximal", "train.local_rule_args": {"mu": 1}}, "train.local_rule: .* no gradient"),
        ({"train.gradient_checkpointing": True}, "train.gradient_checkpointing: .* no gradient"),
        ({"train.optimizer": "adamw"}, "train.optimizer 'adamw': .* sgd alone"),
        ({"train.clients_per_pass": 2}, "train.clients_per_pass has no effect in train.engine zeroth_order"),
        ({"personal.ditto": 0.1}, "finetune_steps goes with it"),
        ({"personal.keep_local": ["layers.1"]}, "finetune_steps goes with it"),
        ({"train.steps": None, "train.epochs": 1, "federation.strategy_args": {"probabilities": True}}, "train.steps"),
        ({"federation.strategy_args": {"probabilities": 1}}, "probabilities: found 1, expected true or false"),
        ({"federation.strategy_args": {"clip": 0}}, "clip: found 0, expected a number above 0"),
        ({"federation.strategy_args": {"clip": 5.0}}, "clip: has no effect without probabilities: true"),
        ({"adapter": {"method": "seeds", "options": {"seeds": 2}}}, "options.seeds: method seeds has none"),
        ({"adapter": {"method": "seeds", "options": {"candidates": 0}}}, "options.candidates: found 0"),
        ({"adapter": {"method": "seeds", "options": {"candidates": 2.5}}}, "options.candidates: found 2.5"),
        ({"adapter": {"method": "seeds", "options": {"eps": 0}}}, "options.eps: found 0; expected"),
        ({"adapter": {"method": "seeds", "start": "there"}}, "adapter.start has no effect"),
    ],
)  # fmt: skip
def test_what_it_cannot_run_with_is_one_line(over, why, tmp_path):
    refused(over, why, tmp_path)
