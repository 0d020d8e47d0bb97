"""One small real run that all report tests read, and copies of it that something was done to."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sheepfold import simulation
from sheepfold.report.facts import read_run
from tests import encoders
from tests.runs import experiment
from tests.small import one_thread

HOSTILE = ("<script>alert(1)</script>", 'a"b', "</script><img src=x onerror=alert(2)>", "%{y} & <b>c</b>")


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """The folder of a run with every kind of score: four clients, two rounds."""
    folder = tmp_path_factory.mktemp("report")
    asked = {
        "baselines": ["local", "centralised"],
        "evaluation.metrics": ["exact_match"],
        "evaluation.generation": {"max_new_tokens": 2},
        "personal.finetune_steps": 1,
        "federation.strategy": "flexlora",
        "adapter.ranks": [2, 4],
        "federation.clients_per_round": 3,
        "data.partition": {"by": "shards", "clients": 4, "holdout_per_category": 1},
        "adapter.rank": 8,
    }
    with one_thread():
        return simulation.run(experiment(folder, **asked)).folder


@pytest.fixture
def facts(ran):
    return read_run(ran)


@pytest.fixture
def copied(ran, tmp_path):
    """Make a copy of the run: options set anew, and what is to be done to each line of the journal."""

    def make(name="copy", lines=None, keep=None, **options):
        folder = tmp_path / name
        shutil.copytree(ran, folder)
        settings = yaml.safe_load((folder / "experiment.yaml").read_text())
        for key, value in ({"name": name} | options).items():
            *parents, last = key.split("__")
            node = settings
            for parent in parents:
                node = node[parent]
            node[last] = value
        (folder / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        change_lines(folder, lines, keep)
        (folder / "closing.json").touch()  # a copy keeps its date, and would be older than the journal written now
        return folder

    return make


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """The folder of a run of task classification whose server trains a teacher; judged on the global test set alone."""
    folder = tmp_path_factory.mktemp("taught")
    asked = {
        "federation.strategy": "fedkd",
        "federation.strategy_args": {"fedkd": {"teacher": str(encoders.saved(folder / "teacher"))}},
        "data.public": {"share": 0.2},
        "data.partition": {"by": "order", "clients": 4, "holdout_per_category": 6},
        "data.eval_share": 0,
        "evaluation.metrics": ["matthews"],
    }
    with one_thread():
        return simulation.run(encoders.experiment(folder, **asked)).folder


@pytest.fixture
def three(taught, tmp_path):
    """FedAvg of the whole model, FedLoRA and FedKD-LoRA, two seeds each, as runs' folders: copies of one run."""

    def worse(by):
        def change(line):
            line["held_out"]["accuracy"]["global"] -= by * line["round"]
            if by:
                line.pop("teacher"), line["seconds"].pop("server", None)
            return line

        return change

    made = []
    methods = {"avg": ("fedavg", "full", 0.02), "lora": ("fedavg", "lora", 0.03), "kd": ("fedkd", "lora", 0.0)}
    for name, (strategy, method, by) in methods.items():
        for seed in range(2):
            folder = tmp_path / f"{name}{seed}"
            shutil.copytree(taught, folder)
            settings = yaml.safe_load((folder / "experiment.yaml").read_text()) | {"name": folder.name, "seed": seed}
            settings["federation"]["strategy"], settings["adapter"]["method"] = strategy, method
            settings["train"]["engine"] = "cohort" if method == "lora" else "peft_model"
            (folder / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
            change_lines(folder, worse(by and by + 0.01 * seed))
            (folder / "closing.json").touch()
            made.append(folder)
    return made


def change_lines(folder: Path, change=None, keep=None) -> None:
    file = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()][:keep]
    file.write_text("".join(json.dumps((change or (lambda line: line))(line)) + "\n" for line in lines))


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def renamed(folder: Path, names: tuple[str, ...] = HOSTILE) -> None:
    """Give the run's clients other names, everywhere."""
    for file in ("rounds.jsonl", "closing.json", "data.json"):
        text = (folder / file).read_text()
        for i, name in enumerate(names):
            text = text.replace(f"client-{i}", json.dumps(name)[1:-1])
        (folder / file).write_text(text)
