"""The seeds' experiments between processes, with the seeds' options: FedKD-LoRA on SST-2, FedIT (Shepherd) on Dolly.

Rows and rounds are few, so that each takes minutes; docs/results.md has figures of longer runs.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from sheepfold import finetuning, shrink, simulation
from sheepfold.config import Experiment, load, recipe
from sheepfold.data import split_files
from tests import small
from tests.network.federation import Federation

pytestmark = [pytest.mark.network, pytest.mark.lab, pytest.mark.slow]

OF_SERVER = ("public.json", "global_test.json")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them, and the processes have one each."""
    with small.one_thread():
        yield


def asked(name: str, folder: Path, *over: str) -> Experiment:
    return load(recipe(name), [f"output={folder}/runs", f"cache={folder}/cache", *over])


def first_lines(path: Path, count: int, out: Path) -> None:
    """Write a table's header and its first rows."""
    with path.open(encoding="utf-8") as text:
        out.write_text("".join(itertools.islice(text, count + 1)), encoding="utf-8")


def parted(one_pile: Experiment, folder: Path) -> list[str]:
    """Write each client's rows to <folder>/rows, and the server's beside it; return the clients' names."""
    written = split_files.write(one_pile.data, folder / "split")
    (folder / "rows").mkdir()
    for number in range(written.clients):
        shutil.move(written.folder / f"local_training_{number}.json", folder / "rows")
    for name in OF_SERVER:
        if (written.folder / name).exists():
            shutil.move(written.folder / name, folder)
    return [f"client-{number}" for number in range(written.clients)]


def between_processes(experiment: Experiment, names: list[str], folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Run an experiment with a process a client, each with its own rows and its own copy of the base."""
    with Federation(folder / "net", names) as made:
        made.server.start()
        for number, name in enumerate(names):
            shutil.copytree(experiment.model.base, made.folder / name / "base")
            rows = json.loads((folder / "rows" / f"local_training_{number}.json").read_text())
            made.node(name, rows, model="base", **settings)
            made.join(name)
        made.there()
        return made.run({**experiment.model_dump(mode="json"), "output": str(made.folder / "runs")}).finish(900)


def in_one_process(experiment: Experiment) -> list[dict[str, Any]]:
    outcome = simulation.run(experiment.model_copy(update={"name": "here"}))
    return [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]


def told(folder: Path, names: list[str]) -> list[str]:
    """Return what each client was told of the run, as its machine has written it down."""
    return [next((folder / "net" / name / "kept").glob("runs/*/charter.json")).read_text() for name in names]


def test_four_clients_and_a_server_that_distils_come_to_the_bits_of_one_process(
    lab: Path, minilm: Path, tmp_path: Path
) -> None:
    shrink.shrink(str(minilm), tmp_path / "student", [1, 3, 5])
    (tmp_path / "sst2").mkdir()
    first_lines(lab / "data" / "sst2" / "train.tsv", 320, tmp_path / "sst2" / "train.tsv")
    first_lines(lab / "data" / "sst2" / "dev.tsv", 96, tmp_path / "sst2" / "dev.tsv")
    one_pile = asked("fedkd-sst2", tmp_path, f"data.path={tmp_path}/sst2", f"model.base={minilm}")
    teacher = finetuning.finetune(one_pile, tmp_path / "teacher", finetuning.Arguments(epochs=1)).folder
    names = parted(one_pile, tmp_path)
    assert len(names) == 4
    whole = asked(
        "fedkd-sst2",
        tmp_path,
        f"model.base={tmp_path}/student",
        "adapter.targets=auto",
        f"data.source={tmp_path}/rows",
        "data.partition.by=files",
        "data.public.share=0",
        f"data.public.source={tmp_path}/public.json",
        f"data.test_split={tmp_path}/global_test.json",
        "data.labels=[negative, positive]",
        f"federation.strategy_args.fedkd.teacher={teacher}",
        "federation.strategy_args.fedkd.student_lr=0.001",
        "federation.rounds=2",
        "train.lr=0.001",
        "train.clients_per_pass=1",
    )
    there = between_processes(whole, names, tmp_path, policy={"tasks": ["classification"]})
    assert [line["round"] for line in there] == [0, 1, 2]
    for line in there[1:]:
        assert list(line["clients"]) == names
        assert not line["absent"]
        assert line["downlink_bytes"] < os.path.getsize(teacher / "model.safetensors") / 100
    assert there[-1]["teacher"]["loss"] < there[0]["teacher"]["loss"]
    for charter in told(tmp_path, names):
        assert str(teacher) not in charter
        assert str(tmp_path / "public.json") not in charter
    here = in_one_process(whole)
    assert [line["adapter"] for line in there] == [line["adapter"] for line in here]
    assert [line["teacher"] for line in there] == [line["teacher"] for line in here]
    assert [line["held_out"] for line in there] == [line["held_out"] for line in here]


def test_three_clients_of_dolly_come_to_the_bits_of_one_process(lab: Path, tmp_path: Path) -> None:
    one_pile = asked(
        "shepherd-dolly", tmp_path, f"data.path={lab}/data/dolly/train.jsonl.gz", "data.partition.clients=3"
    )
    names = parted(one_pile, tmp_path)
    whole = asked(
        "shepherd-dolly",
        tmp_path,
        f"model.base={lab}/models/lab-llama-1m",
        f"data.source={tmp_path}/rows",
        "data.partition.by=files",
        "data.partition.holdout_per_category=0",
        f"data.test_split={tmp_path}/global_test.json",
        "adapter.targets=all-linear",  # the seed's q_proj and 3e-4 are a 7B model's
        "train.lr=3e-3",
        "train.epochs=null",
        "train.steps=3",
        "train.batch_rows=16",
        "train.clients_per_pass=1",
        "federation.fraction=1.0",
        "federation.rounds=2",
    )
    there = between_processes(whole, names, tmp_path)
    assert [list(line["clients"]) for line in there[1:]] == [names, names]
    losses = [line["held_out"]["loss"]["global"] for line in there]
    assert losses == sorted(losses, reverse=True)
    here = in_one_process(whole)
    assert [line["adapter"] for line in there] == [line["adapter"] for line in here]
    assert losses == [line["held_out"]["loss"]["global"] for line in here]
