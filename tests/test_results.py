"""results.json says what the journal says, in one file."""

import json

import pytest

from sheepfold import simulation
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.results import FILE, results, write_results
from tests import encoders, runs, small


@pytest.fixture(autouse=True)
def one_thread():
    with small.one_thread():
        yield


@pytest.fixture
def folder(tmp_path):
    """A folder written by hand: a start and three rounds, the second of them not evaluated."""
    made = RunFolder(tmp_path / "run")
    made.create(runs.experiment(tmp_path, **{"federation.strategy": ["fedprox", "flexlora"], "seed": 7}))
    made.append({"round": 0, "held_out": held_out(2.0), "adapter": "a0", "seconds": {"evaluation": 1.0}})
    for n, evaluated in ((1, True), (2, False), (3, True)):
        line = {"round": n, "train_loss": 1.0 / n, "uplink_bytes": 10, "downlink_bytes": 30, "adapter": f"a{n}"}
        line["seconds"] = {"round": 5.0, "server": 2.0, "forward": 1.0} | ({"evaluation": 0.5} if evaluated else {})
        made.append(line | ({"held_out": held_out(2.0 - n)} if evaluated else {}))
    return made


def held_out(loss, **more):
    return {"loss": {"weighted": loss, "plain": loss + 9, **more}, "clients": {"weighted": 5.0, "b": loss}}


def test_every_evaluated_round_is_there_with_its_figures_and_the_seconds_until_then(folder):
    told = results(folder)
    assert told["rows"] == "weighted"
    assert [(r["round"], r["loss"], r["seconds"]) for r in told["rounds"]] == [
        (0, 2.0, 1.0),
        (1, 1.0, 6.5),
        (3, -1.0, 17),
    ]
    assert [r.get("train_loss") for r in told["rounds"]] == [None, 1.0, 1 / 3]
    assert told["seconds"] == {"training": 9.0, "server": 6.0, "evaluation": 2.0, "total": 17.0}
    assert (told["bytes"], told["adapter"]) == ({"up": 30, "down": 90}, "a3")


def test_the_run_and_all_of_its_arguments_are_named(folder):
    told = results(folder)
    assert (told["name"], told["method"], told["task"], told["seed"]) == (
        "small",
        "fedprox over flexlora",
        "causal_lm",
        7,
    )
    assert told["arguments"] == folder.experiment().model_dump(mode="json")


def test_the_global_test_set_comes_before_the_clients_rows(folder):
    folder.append(
        {"round": 4, "held_out": held_out(1.5, **{"global": 1.25}), "adapter": "a4", "seconds": {"round": 1.0}}
    )
    told = results(folder)
    assert told["rows"] == "global"
    assert told["rounds"][-1]["loss"] == 1.25
    assert "loss" not in told["rounds"][0], "a round without that figure must not show another one in its place"


def test_a_closed_models_own_figures_stand_beside_its_emulators(folder):
    line = {"held_out": held_out(1.5), "held_out_full": held_out(1.1)}
    folder.append({"round": 4, **line, "adapter": "a4", "seconds": {"round": 1.0}})
    assert results(folder)["rounds"][-1]["full"] == {"loss": 1.1}


def test_a_figure_that_is_not_finite_is_null(folder):
    folder.append({"round": 4, "held_out": held_out(float("nan")), "adapter": "a4", "seconds": {"round": 1.0}})
    write_results(folder, None)
    assert json.loads((folder.path / FILE).read_text())["rounds"][-1]["loss"] is None


def test_the_closing_tables_means_are_there_where_there_is_one(folder):
    scores = {"loss": {"a": {"base": 3.0, "federated": 1.0}, "b": {"base": 5.0, "federated": 2.0}}}
    scores["loss"]["shared"] = {"base": 4.5, "federated": 1.75}
    told = results(folder, Closing(scores, ["a", "b"], 12))
    means = {"own_rows": {"base": 4.0, "federated": 1.5}, "everybodys": {"base": 4.5, "federated": 1.75}}
    assert told["closing"] == {"loss": means}
    assert "closing" not in results(folder)


def test_a_run_ends_with_it_and_a_resumed_one_with_that_of_the_uninterrupted(tmp_path):
    encoders.saved(tmp_path / "teacher")
    over = {
        "federation.strategy": "fedkd",
        "federation.strategy_args": {"fedkd": {"teacher": str(tmp_path / "teacher")}},
        "data.public": {"share": 0.2},
        "data.partition": {"by": "iid", "clients": 4, "holdout_per_category": 4},
        "evaluation.metrics": ["matthews"],
    }
    first = simulation.run(encoders.experiment(tmp_path, **over))
    told = json.loads((first.folder / FILE).read_text())
    lines = [json.loads(line) for line in (first.folder / "rounds.jsonl").read_text().splitlines()]
    for line, said in zip(lines, told["rounds"], strict=True):
        for measure in ("loss", "accuracy", "matthews"):
            assert said[measure] == line["held_out"][measure]["global"]
        assert said["teacher"] == line["teacher"]
        assert said["teacher"].keys() == {"loss", "accuracy", "matthews"}
    assert told["adapter"] == first.state.hash()
    assert 0 < told["seconds"]["server"] == sum(line["seconds"].get("server", 0.0) for line in lines)
    assert all(line["seconds"]["server"] < line["seconds"]["round"] for line in lines[1:])
    assert told["closing"]["matthews"]["everybodys"]["federated"] == told["rounds"][-1]["matthews"]

    simulation.run(encoders.experiment(tmp_path, **over), resume=True)
    assert json.loads((first.folder / FILE).read_text()) == told, "nothing was left to do"
    longer = simulation.run(encoders.experiment(tmp_path, **over | {"federation.rounds": 3}), resume=True)
    again = json.loads((longer.folder / FILE).read_text())
    assert (longer.folder, again["rounds"][:3]) == (first.folder, told["rounds"])
    assert (len(again["rounds"]), again["arguments"]["federation"]["rounds"]) == (4, 3)
