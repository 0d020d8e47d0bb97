"""Centralised fine-tuning: the plain loop's weights, on the rows asked for and no others, in a folder others load."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from sheepfold import simulation
from sheepfold.assembly import assemble
from sheepfold.config import build, dump
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.errors import ConfigError, TrainingError
from sheepfold.finetuning import Arguments, finetune
from sheepfold.joining import EVERYONE
from sheepfold.local.steps import step_rows
from tests import encoders, runs, small
from tests.test_cli import typed

PUBLIC = 24
"""A quarter of tests/encoders.py's rows."""


@pytest.fixture(autouse=True)
def one_thread():
    with small.one_thread():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base that has a head of its own, of two labels."""
    folder = tmp_path_factory.mktemp("finetune")
    encoders.saved(folder / "base", head=True)
    return folder


def experiment(place, **over):
    usual = {"model.dtype": "float64", "data.public.share": 0.25, "train.steps": None, "train.weight_decay": 0.05}
    return encoders.experiment(place, **usual | over)


@pytest.fixture(scope="module")
def teacher(place):
    """What three epochs on the public rows make."""
    with small.one_thread():
        return finetune(experiment(place), place / "teacher", Arguments(epochs=3))


def texts(place, numbers):
    """The encoded rows of these numbers and their labels, by plain transformers."""
    with (place / "rows.tsv").open() as file:
        read = list(csv.DictReader(file, delimiter="\t"))
    rows = [read[n] for n in numbers]
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    encoded = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    return encoded, torch.tensor([["bad", "good"].index(row["label"]) for row in rows])


def test_the_weights_are_a_plain_loops(place, teacher):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(place / "base", dtype=torch.float64).eval()  # without dropout, as bases are here
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    total = 3 * PUBLIC // 4
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for step in range(total):
        encoded, labels = texts(place, step_rows(0, EVERYONE, np.arange(PUBLIC), 4, step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**encoded).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    ours = auto.from_pretrained(teacher.folder).state_dict()
    assert ours.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], tensor, atol=1e-9, rtol=0, msg=name)
    moved = auto.from_pretrained(place / "base", dtype=torch.float64).get_parameter("classifier.weight")
    assert (ours["classifier.weight"] - moved).abs().max() > 1e-3


def test_the_folder_is_a_plain_model_of_the_evaluated_figures(place, teacher):
    made = json.loads((teacher.folder / "finetune.json").read_text())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(teacher.folder).eval()
    assert transformers.AutoTokenizer.from_pretrained(teacher.folder)("w1 w2")["input_ids"] == [2, 6, 7, 3]
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.1, 0.1)
    clients = assemble(experiment(place)).data.clients.values()
    encoded, labels = texts(place, np.concatenate([client.eval for client in clients]))
    with torch.no_grad():
        logits = model(**encoded).logits
    held_out = made["epochs"][-1]["held_out"]
    assert held_out["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-9)
    assert held_out["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert [epoch["epoch"] for epoch in made["epochs"]] == [0, 1, 2, 3]
    assert made["epochs"][3]["train_loss"] < made["epochs"][1]["train_loss"]
    assert made["arguments"] == {"on": "public", "epochs": 3, "method": "full", "schedule": "linear"}
    assert (made["rows"], made["held_out_rows"], made["steps"]) == ({"public": PUBLIC}, len(labels), 18)
    assert build(made["experiment"]) == experiment(place)


def test_the_card_says_what_was_done_and_nothing_of_a_federation(teacher):
    card = (teacher.folder / "README.md").read_text()
    assert "in one place with sheepfold: 3 epochs on 24 rows" in card
    assert "24: the first 25 % of the rows" in card
    assert f"| accuracy | {teacher.facts['epochs'][0]['held_out']['accuracy']:.4f} |" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    for word in ("federated", "clients.", "not stated."):
        assert word not in card


@pytest.mark.parametrize(("on", "share"), [("public", 0.25), ("clients", 0.25), ("all", 0.25), (None, 0.0)])
def test_every_row_asked_for_is_trained_on_once_an_epoch_and_no_other(place, tmp_path, monkeypatch, on, share):
    seen = []
    gradients = PeftModelEngine._gradients
    monkeypatch.setattr(
        PeftModelEngine,
        "_gradients",
        lambda self, job, parts, *rest: (
            seen.extend(int(row) for part in parts for row in part.rows) or gradients(self, job, parts, *rest)
        ),
    )
    asked = experiment(place, **{"data.public.share": share})
    made = finetune(asked, tmp_path / "out", Arguments(on, epochs=2))
    data = assemble(asked).data
    clients = [int(row) for client in data.clients.values() for row in client.train]
    expected = {"public": list(range(PUBLIC)), "clients": clients, "all": [*range(PUBLIC), *clients]}
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert sorted(first) == sorted(second) == sorted(expected[on or "clients"])
    assert first != second
    assert sum(made.facts["rows"].values()) == len(first)
    assert not set(data.public) & set(clients)


def test_a_fedkd_run_takes_it_as_its_teacher(place, teacher):
    arguments = {"teacher": str(teacher.folder), "batch_rows": 8}
    over = {"federation.strategy": "fedkd", "federation.strategy_args": arguments, "federation.rounds": 1}
    outcome = simulation.run(experiment(place, name="fedkd", **over))
    before, after = [json.loads(line)["teacher"] for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    assert before == pytest.approx(teacher.facts["epochs"][-1]["held_out"], abs=1e-9)
    assert after["loss"] != before["loss"]


def test_an_experiment_of_fedkd_makes_its_own_teacher(place, tmp_path):
    over = {"federation.strategy": "fedkd", "federation.strategy_args": {"teacher": str(tmp_path / "teacher")}}
    finetune(experiment(place, **over), tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").is_file()


def test_lora_makes_an_adapters_folder_of_the_evaluated_figures(place, tmp_path):
    from peft import PeftModel

    asked = experiment(place, **{"adapter.method": "full"})  # which the argument is over
    made = finetune(asked, tmp_path / "out", Arguments("clients", 2, "lora", "cosine"))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False).eval()
    data = assemble(asked).data
    encoded, labels = texts(place, np.concatenate([client.eval for client in data.clients.values()]))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(**encoded).logits, labels)
    assert float(loss) == pytest.approx(made.facts["epochs"][-1]["held_out"]["loss"], abs=1e-6)
    assert made.facts["epochs"][-1]["held_out"]["loss"] != made.facts["epochs"][0]["held_out"]["loss"]
    assert "LoRA adapter" in (tmp_path / "out" / "README.md").read_text()


def test_a_causal_model_learns_and_leaves_as_one(tmp_path):
    small.saved(tmp_path / "base")
    over = {"model": {"base": str(tmp_path / "base")}, "data.public.share": 0.3, "train.steps": None, "train.lr": 1e-3}
    asked = runs.experiment(tmp_path, **over)
    made = finetune(asked, tmp_path / "out", Arguments(epochs=2))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    data = assemble(asked).data
    total = count = 0.0
    for row in np.concatenate([client.eval for client in data.clients.values()]):
        ids, labels = data.tokens.row(int(row))
        targets = int((labels[1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids[None], labels=labels[None]).loss) * targets
        count += targets
    start, *_, end = [epoch["held_out"] for epoch in made.facts["epochs"]]
    assert end == {"loss": pytest.approx(total / count, abs=1e-5)}
    assert end["loss"] < start["loss"]


def test_the_same_command_gives_the_same_bits(place, tmp_path, teacher):
    again = finetune(experiment(place), tmp_path / "again", Arguments(epochs=3))
    assert again.facts["hash"] == teacher.facts["hash"]


@pytest.fixture(scope="module")
def file(place):
    path = place / "experiment.yaml"
    path.write_text(dump(experiment(place)))
    return path


def test_the_command_takes_a_share_says_its_rows_and_prints_a_line_an_epoch(capsys, file, tmp_path):
    words = ["data.public.pick=random", "--share", "0.5", "--epochs", "2"]
    code, out, err = typed(capsys, "finetune", file, tmp_path / "out", *words)
    lines = out.splitlines()
    assert code == 0, err
    assert "trained on 48 rows, public: 50 % of the rows, at random; 24 steps" in lines[1]
    assert [line.partition(":")[0] for line in lines[3:6]] == ["before", "epoch 1 of 2", "epoch 2 of 2"]
    last = json.loads((tmp_path / "out" / "finetune.json").read_text())["epochs"][-1]
    for figure in (last["train_loss"], last["held_out"]["loss"], last["held_out"]["accuracy"]):
        assert f"{figure:.4f}" in lines[5]
    assert lines[-1] == str(tmp_path / "out")
    code, out, err = typed(capsys, "finetune", file, tmp_path / "json", "--json")
    assert json.loads(out) == json.loads((tmp_path / "json" / "finetune.json").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "publik"], "--on 'publik': did you mean 'public'?"),
        (["--on", "public", "data.public.share=0"], "--on public: the experiment has no public rows; give --share"),
        (["--share", "1.5"], "data.public.share: found 1.5; input should be less than 1"),
        (["--share", "0.2", "--on", "clients"], "--share 0.2 has no effect with --on clients"),
        (["--epochs", "0"], "--epochs 0: expected at least 1"),
        (["--method", "dora"], "--method 'dora': did you mean 'lora'? known: lora, full"),
        (["--schedule", "step"], "--schedule 'step': known: "),
        (["train.epochs=2"], "train.epochs=2: has no effect on finetune; give --epochs"),
        (["train.schedule=linear"], "train.schedule=linear: has no effect on finetune; give --schedule"),
        (["federation.rounds=2"], "federation.rounds=2: has no effect on finetune; there are no rounds"),
        (["adapter.rank=2"], "adapter.rank=2: has no effect on finetune; all weights are trained"),
        (["adapter.start=there"], "adapter.start there has no effect with --method full; merge it"),
        (["model.dtype=bfloat16"], "model.dtype bfloat16 with --method full: small steps vanish"),
        (["model.bits=8", "model.dtype=float32"], "model.bits 8 with --method full: quantised weights stay"),
        (["--method", "lora", "train.compile=true"], "train.compile=true: has no effect on finetune; it trains in"),
        (["train.packing=true"], "train.packing=true: has no effect on finetune; it trains in engine peft_model"),
        (["--method", "lora", "adapter.ranks=[2, 4]", "adapter.rank=8"], "adapter.ranks says ranks of clients"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_loaded(capsys, file, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("sheepfold.finetuning.assemble", None)
    code, out, err = typed(capsys, "finetune", file, tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_before_anything_is_loaded(capsys, file, tmp_path, monkeypatch):
    monkeypatch.setattr("sheepfold.finetuning.assemble", None)
    code, _, err = typed(capsys, "finetune", file, file.parent)
    assert (code, err) == (
        2,
        f"sheepfold: {file.parent}: is there and not empty; choose a new folder, or empty this one\n",
    )
    code, _, err = typed(capsys, "finetune", file, "model.base=x")
    assert (code, "expected EXPERIMENT.yaml OUT first" in err) == (2, True)


def test_an_interrupted_training_leaves_nothing(capsys, file, tmp_path, monkeypatch):
    steps = []

    def interrupted(self, steps_taken):
        steps.append(steps_taken)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("sheepfold.finetuning._Watch.step", interrupted)
    code, _, err = typed(capsys, "finetune", file, tmp_path / "out")
    assert (code, err) == (130, f"sheepfold: interrupted; nothing was written to {tmp_path / 'out'}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_a_machine_that_is_full_is_one_line(capsys, file, tmp_path, monkeypatch, error):
    def full(self, steps_taken):
        raise error

    monkeypatch.setattr("sheepfold.finetuning._Watch.step", full)
    code, _, err = typed(capsys, "finetune", file, tmp_path / "out")
    said = str(error) or "MemoryError"
    assert (code, err.startswith(f"sheepfold: out of memory ({said}); set train.micro_rows lower")) == (2, True)
    assert err.count("\n") == 1


def test_training_that_overflows_writes_nothing_and_skipped_steps_are_told(place, tmp_path):
    told = []
    listener = lambda event, facts: told.append((event, dict(facts)))  # noqa: E731
    asked = experiment(place, **{"train.lr": 1e300, "train.grad_norm": None})
    with pytest.raises(TrainingError, match=r"^finetune: the held-out loss is no longer finite; lower train.lr"):
        finetune(asked, tmp_path / "out", Arguments(epochs=2), listener)
    assert list(tmp_path.iterdir()) == []
    skipped = [facts["skipped_steps"] for event, facts in told if "skipped_steps" in facts]
    assert skipped
    assert skipped[-1] == PUBLIC // 4


def test_without_held_out_rows_it_trains_all_the_same(place, tmp_path):
    made = finetune(experiment(place, **{"data.eval_share": 0}), tmp_path / "out")
    assert made.facts["epochs"][1]["held_out"] == {}
    assert "## Held out" not in (tmp_path / "out" / "README.md").read_text()


def test_arguments_are_checked_when_they_are_made():
    with pytest.raises(ConfigError, match="--on 'x'"):
        Arguments(on="x")


def test_baselines_of_whole_models_are_compared_and_written_with_the_dropout_of_their_base(place):
    over = {"adapter.method": "full", "train.epochs": 2, "baselines": ["local", "centralised"], "name": "whole"}
    outcome = simulation.run(experiment(place, **over, **{"data.public.share": 0.0}))
    shared = outcome.closing.scores["loss"]["shared"]
    assert {"base", "federated", "centralised", "local:client-0"} <= shared.keys()
    assert all(math.isfinite(value) for value in shared.values())
    assert shared["centralised"] < shared["base"]
    assert len(set(shared.values())) == len(shared)
    config = yaml.safe_load(Path(outcome.folder / "adapter" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == 0.1


@pytest.mark.lab
@pytest.mark.slow
def test_a_real_encoder_learns_sentiment_from_the_public_share(lab, minilm, tmp_path):
    asked = build(
        {
            "task": "classification",
            "cache": str(tmp_path / "cache"),
            "model": {"base": str(minilm)},
            "data": {
                "source": "sst2",
                "path": str(lab / "data" / "sst2"),
                "rows": 1500,
                "partition": {"clients": 4},
                "public": {"share": 0.2},
                "eval_share": 0.2,
                "max_tokens": 64,
            },
            "train": {"batch_rows": 16, "lr": 1e-4},
        }
    )
    made = finetune(asked, tmp_path / "teacher", Arguments(epochs=2))
    start, *_, end = [epoch["held_out"]["accuracy"] for epoch in made.facts["epochs"]]
    assert made.facts["rows"] == {"public": 300}
    assert end > 0.65 > start
