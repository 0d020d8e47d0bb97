"""A run that two processes share is the run of one: the same bits where passes are the same, else the same to rounding.

One start of two processes does many runs: their imports take longer than these.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sheepfold import simulation
from sheepfold import state as states
from sheepfold.config import Experiment, dump
from tests import encoders, small
from tests.devices.together import ended, start
from tests.offsite import bases
from tests.strategies.test_fedkd import kd, shelf  # noqa: F401, a fixture
from tests.test_apart import CLOSINGS, NARROW, ONE, OTHERS, close, tiny
from tests.test_stateful import METHODS, kept

Over = Mapping[str, Any]
FURTHER: dict[str, Over] = {
    **{name: METHODS[name] for name in ("flexlora", "scaffold")},
    **{name: OTHERS[name] for name in ("keep_local", "ia3")},
}
WHOLE: dict[str, Over] = {
    "two in a pass": {"train.clients_per_pass": 2, "federation.clients_per_round": 4, "adapter.dropout": 0.1},
    "ffa_lora": METHODS["ffa_lora"] | {"personal.finetune_steps": 2, **NARROW},
    "closing": {**CLOSINGS["baselines"], **CLOSINGS["answers"]},
}
"""Runs whose shares are whole passes; FURTHER ones are a slow test"""
LOW: Over = {"train.clients_per_pass": None, "federation.clients_per_round": 4, "train.lr": 1e-3, "train.steps": 5}
CUT: Over = METHODS["hetlora"] | LOW
"""A run whose one pass is cut in two"""


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.quick():
        yield


def labelled(folder: Path, **over: Any) -> Experiment:
    """Return a run over rows with labels."""
    more = {"evaluation.metrics": ["f1"], "baselines": ["local"]}
    return encoders.experiment(folder, **more, **ONE, **over)


def share(folder: Path, runs: Mapping[str, Experiment], world: int = 2) -> None:
    """Let so many processes go through these runs."""
    for name, made in runs.items():
        (folder / f"{name}.yaml").write_text(dump(made))
    for code, out, err in ended(start(["-m", "tests.devices.together", str(folder)], world), timeout_s=600):
        assert (code, out) == (0, ""), err[-3000:]


@pytest.fixture(scope="module")
def shared(base, tmp_path_factory) -> Path:
    """The folder of all these runs: <name>/runs/small."""
    folder = tmp_path_factory.mktemp("shared")
    runs = {name: tiny(folder / name, base, **over) for name, over in WHOLE.items()}
    share(folder, runs | {"cut": tiny(folder / "cut", base, **CUT)})
    return folder


def outcome(folder: Path) -> simulation.Outcome:
    """Return what a run of other processes left."""
    [run] = (folder / "runs").iterdir()
    return simulation.Outcome(run, states.load(run / "state" / "latest.safetensors"), None, False)


def journal(run: simulation.Outcome) -> list[dict[str, Any]]:
    """Return the journal without what differs between any two runs."""
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "memory", "processes")} for line in lines
    ]


def check_same(folder: Path, here: simulation.Outcome) -> None:
    """Assert that a shared run and one of this process left the same: states and what clients keep to the bit."""
    there = outcome(folder)
    for ours, theirs in zip(journal(here), journal(there), strict=True):
        close(theirs.pop("held_out", {}), ours.pop("held_out", {}))  # rows that share a batch are others
        assert theirs == ours
    assert kept(there) == kept(here)
    for file in ("closing.json", "results.json"):
        assert (there.folder / file).exists() == (here.folder / file).exists()
    if (here.folder / "closing.json").exists():
        ours, theirs = (json.loads((run.folder / "closing.json").read_text()) for run in (here, there))
        close(theirs["scores"], ours["scores"])


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_give_the_bits_of_one(name, base, shared, tmp_path):
    check_same(shared / name, simulation.run(tiny(tmp_path, base, **WHOLE[name])))


@pytest.mark.slow
def test_rows_with_labels_are_judged_in_two_processes(tmp_path):
    share(tmp_path, {"labels": labelled(tmp_path / "labels")})
    check_same(tmp_path / "labels", simulation.run(labelled(tmp_path / "one")))


def test_a_pass_cut_in_two_gives_the_same_to_rounding(base, shared, tmp_path):
    one, two = simulation.run(tiny(tmp_path, base, **CUT)), outcome(shared / "cut")
    assert 0 < small.gap(one.state.adapter, two.state.adapter) <= 5e-5
    for ours, theirs in zip(journal(one), journal(two), strict=True):
        ours.pop("adapter"), theirs.pop("adapter")
        close(theirs, ours)


@pytest.mark.slow
def test_mixed_ranks_states_own_parts_and_other_methods_are_shared_to_the_bit(base, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    share(folder, {name: tiny(folder / name, base, **over) for name, over in FURTHER.items()})
    for name, over in FURTHER.items():
        check_same(folder / name, simulation.run(tiny(tmp_path / name, base, **over)))


@pytest.mark.slow
def test_emulators_and_a_servers_teacher_are_where_they_should_be(shelf, tmp_path):  # noqa: F811
    closed, few = bases.saved(tmp_path / "closed"), {"federation.rounds": 2, **ONE}

    def runs(folder: Path) -> dict[str, Experiment]:
        emulated = bases.run_of(closed, folder / "emulated", **few, **CLOSINGS["answers"])
        return {"emulated": emulated, "distilled": kd(shelf, folder / "distilled", **few)}

    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    share(tmp_path / "two", runs(tmp_path / "two"))
    for name, made in runs(tmp_path / "one").items():
        one, two = simulation.run(made), outcome(tmp_path / "two" / name)
        assert two.state.hash() == one.state.hash()
        for ours, theirs in zip(journal(one), journal(two), strict=True):
            close(theirs, ours)
