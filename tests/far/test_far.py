"""A run between machines is the run in one process, to the bit, for those whose updates count."""

import json
from pathlib import Path

import pytest

from sheepfold import simulation
from sheepfold.clients import Here
from sheepfold.errors import CheckpointError, ConfigError, DataError
from sheepfold.messages import Absence
from tests import runs
from tests.far.fleet import Fleet, ServerDies, experiment
from tests.far.scripted import EVER, Life, Stuck
from tests.marks import mostly_slow


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def trained(line: dict) -> dict:
    """Return what of a journal's line training decides: not how fast a machine is, and not how rows are judged."""
    known = ("round", "cohort", "lr", "train_loss", "clients", "adapter", "uplink_bytes", "downlink_bytes")
    return {key: line[key] for key in known if key in line}


def assert_judged_the_same(there: Path, here: Path) -> None:
    """Rows of all clients share a forward pass in one process, so that figures round otherwise."""
    for theirs, ours in zip(lines(there), lines(here), strict=True):
        assert theirs["held_out"]["clients"] == pytest.approx(ours["held_out"]["clients"], rel=1e-5)
        assert theirs["held_out"]["loss"] == pytest.approx(ours["held_out"]["loss"], rel=1e-5)


METHODS = {
    "fedavg": {},
    "fedsa, int8": {"federation.strategy": "fedsa", "federation.wire": {"up": "int8", "down": "bf16"}},
    "scaffold": {"federation.strategy": "scaffold", "federation.clients_per_round": 2, "federation.rounds": 3},
    "flora": {"federation.strategy": "flora", "adapter": {"ranks": [2, 4, 4]}},
    "ditto": {"personal.ditto": 0.1},
    "peft_model": {"adapter": {"method": "ia3"}, "train.clients_per_pass": None},
}


@pytest.mark.parametrize("name", mostly_slow(METHODS, quick=["fedsa, int8"]))
def test_three_machines_come_to_what_one_process_comes_to(tmp_path, name):
    asked = experiment(tmp_path, **METHODS[name])
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    fleet = Fleet(tmp_path)
    there = simulation.run(asked, place=fleet.place())
    assert there.adapter.hash() == here.adapter.hash()
    assert list(map(trained, lines(there.folder))) == list(map(trained, lines(here.folder)))
    assert_judged_the_same(there.folder, here.folder)
    assert not (there.folder / "spool").exists()


@pytest.mark.slow
def test_the_closing_table_is_that_of_one_process(tmp_path):
    more = {"evaluation.metrics": ["exact_match"], "evaluation.rows_per_client": 2}
    asked = experiment(tmp_path, **more, baselines=["local"])
    here = simulation.run(asked.model_copy(update={"name": "here"})).closing
    there = simulation.run(asked, place=Fleet(tmp_path).place()).closing
    assert list(there.clients) == list(here.clients)
    for measure, rows in here.scores.items():
        for client in here.clients:  # several adapters share a pass in one process, so that sums round otherwise
            assert there.scores[measure][client] == pytest.approx(rows[client], rel=1e-5)


DIES_AFTER = {"fedavg": 4, "fedsa, int8": 10, "scaffold": 9}
"""Method -> replies that the server sees"""


@pytest.mark.parametrize("name", mostly_slow(DIES_AFTER, quick=["scaffold"]))
def test_a_server_that_dies_in_a_round_goes_on_to_the_same_bits(tmp_path, name):
    asked = experiment(tmp_path, **METHODS[name])
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    fleet = Fleet(tmp_path)
    fleet.dies_after = DIES_AFTER[name]
    with pytest.raises(ServerDies):
        simulation.run(asked, place=fleet.place())
    there = simulation.run(asked, resume=True, place=fleet.place(resume=True))
    assert there.adapter.hash() == here.adapter.hash()
    first, second = fleet.charters
    assert first == second


def test_a_client_that_left_for_good_is_named_and_the_rest_are_weighted_anew(tmp_path):
    asked = experiment(tmp_path, **{"network.quorum": 0.5, "federation.rounds": 3})
    names = ["ann", "bob", "cleo"]
    fleet = Fleet(tmp_path, {names[1]: Life(gone=((2.5, EVER),))})
    there = simulation.run(asked, place=fleet.place())
    absent = [line.get("absent", {}) for line in lines(there.folder)]
    assert absent[0] == absent[1] == {}
    assert all(set(found) == {names[1]} for found in absent[2:])
    assert lines(there.folder)[-1]["not_judged"] == {names[1]: "not connected"}
    assert set(lines(there.folder)[-1]["held_out"]["clients"]) == {names[0], names[2]}


class Replayed(Here):
    """Clients of this process, those away of whom a journal says so."""

    def __init__(self, parts, folder, listener, journal):
        super().__init__(parts, folder, listener)
        self.away = {line["round"] - 1: line["absent"] for line in journal if "absent" in line}

    def train(self, assignments):
        away = self.away[assignments[0].round]
        answers = super().train([a for a in assignments if a.client not in away])
        return (Absence(a.client, away[a.client]) if a.client in away else next(answers) for a in assignments)


class Replay:
    """The place of these."""

    def __init__(self, journal):
        self.journal = journal

    def site(self, experiment):
        return None

    def ready(self, experiment, emulator):
        pass

    def clients(self, parts, folder, listener):
        return Replayed(parts, folder, listener, self.journal)


@pytest.mark.parametrize("name", mostly_slow(["fedsa, int8", "scaffold", "ditto"], quick=["scaffold"]))
def test_an_update_that_did_not_count_leaves_no_trace(tmp_path, name):
    """Bob is late in two rounds, and his machine has kept what it learned then."""
    options = {"network.quorum": 0.6, "network.deadline": 10, "federation.clients_per_round": 3}
    asked = experiment(tmp_path, **(METHODS[name] | options | {"federation.rounds": 4}))
    there = simulation.run(asked, place=Fleet(tmp_path, {"bob": Life(slow=frozenset({0, 2}))}).place())
    journal = lines(there.folder)
    assert [list(line["absent"]) for line in journal[1:]] == [["bob"], [], ["bob"], []]
    assert [list(line.get("late", {})) for line in journal[1:]] == [[], ["bob"], [], ["bob"]]
    here = simulation.run(asked.model_copy(update={"name": "here"}), place=Replay(journal))
    assert there.adapter.hash() == here.adapter.hash()
    assert there.state.drawn == here.state.drawn
    assert there.state.counted == here.state.counted


def late(tmp_path, **over):
    """Run with one client that takes longer than a round."""
    options = {"network.quorum": 0.5, "network.deadline": 10, "federation.rounds": 4} | over
    asked = experiment(tmp_path, **options)
    names = ["ann", "bob", "cleo"]
    fleet = Fleet(tmp_path, {names[0]: Life(takes=15.0)})
    there = simulation.run(asked, place=fleet.place())
    return names, lines(there.folder), there, fleet


def test_a_late_update_is_dropped_and_said_to_be(tmp_path):
    names, journal, there, _ = late(tmp_path)
    assert [line["absent"] for line in journal[1:]] == [{names[0]: "no answer within 10 s"}] * 4
    assert journal[1].get("late") is None
    assert journal[2]["late"] == {names[0]: "its answer of round 1: it came too late and is dropped"}
    assert names[0] not in there.state.counted
    assert names[0] not in journal[2]["clients"]


def test_a_late_update_counts_in_the_next_round(tmp_path):
    names, journal, there, _ = late(tmp_path, **{"network.late": "next"})
    assert journal[2]["absent"] == {names[0]: "no answer within 10 s"}
    assert journal[2]["late"] == {names[0]: "its answer of round 1: counts here"}
    assert set(journal[2]["clients"]) == set(names)
    assert there.state.counted == {names[0]: 3, names[1]: 4, names[2]: 4}
    _, without, _, _ = late(tmp_path / "again")
    assert without[1]["adapter"] == journal[1]["adapter"]
    assert without[2]["adapter"] != journal[2]["adapter"]


def test_with_over_selection_the_round_closes_without_the_slowest(tmp_path):
    asked = experiment(tmp_path, 4, **{"federation.clients_per_round": 2, "network.over_selection": 1.0})
    names = ["ann", "bob", "cleo", "dora"]
    fleet = Fleet(tmp_path, {names[0]: Life(takes=50.0), names[2]: Life(takes=60.0)})
    there = simulation.run(asked, place=fleet.place())
    for line in lines(there.folder)[1:]:
        assert line["cohort"] == names
        assert list(line["clients"]) == [names[1], names[3]]
        assert set(line["absent"].values()) == {"left out: 2 others had answered"}


def test_a_charter_tells_what_clients_need_and_keeps_what_is_the_servers(tmp_path):
    asked = experiment(
        tmp_path, **{"federation.rounds": 1, "trackers": ["tensorboard"], "evaluation.allow_code": False}
    )
    fleet = Fleet(tmp_path)
    simulation.run(asked, place=fleet.place())
    [charter] = fleet.charters
    assert list(charter.clients) == ["ann", "bob", "cleo"]
    assert str(tmp_path) not in charter.as_json()
    theirs = charter.settings()
    assert theirs.train == asked.train
    assert theirs.federation == asked.federation
    assert theirs.trackers == ()


def test_a_run_goes_on_with_the_clients_it_began_with(tmp_path):
    asked = experiment(tmp_path)
    fleet = Fleet(tmp_path)
    fleet.dies_after = 5
    with pytest.raises(ServerDies):
        simulation.run(asked, place=fleet.place())
    place = fleet.place(resume=True, strangers=("newcomer",))
    assert simulation.run(asked, resume=True, place=place).state.round == 2
    (Path(asked.output) / "small" / "network.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"network.json: cannot be read"):
        simulation.run(asked, resume=True, place=fleet.place(resume=True))


def test_the_server_judges_on_rows_of_its_own(tmp_path):
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = experiment(tmp_path, **{"data.test_split": str(tmp_path / "test.jsonl")})
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    there = simulation.run(asked, place=Fleet(tmp_path).place())
    assert_judged_the_same(there.folder, here.folder)
    assert lines(there.folder)[-1]["held_out"]["loss"]["global"] > 0


REFUSED = {
    "share": ({"data.public.share": 0.2}, "data.public.share 0.2: between machines no one has all rows"),
    "holdout": (
        {"data.partition.holdout_per_category": 1},
        "data.partition.holdout_per_category 1: between machines no one has all rows",
    ),
    "offsite": ({"offsite": {"emu_r": 2}}, "offsite: an emulator has no way to another machine"),
    "late": (
        {"network.late": "next", "network.quorum": 0.5, "federation.strategy": "scaffold"},
        "network.late next: federation.strategy scaffold is no mean of factors without memory",
    ),
    "late and ditto": (
        {"network.late": "next", "network.quorum": 0.5, "personal.ditto": 0.1},
        "network.late next: with personal.ditto clients go on from what they kept",
    ),
    "late and int8": (
        {"network.late": "next", "network.quorum": 0.5, "federation.wire.up": "int8"},
        "network.late next: with federation.wire.up int8",
    ),
    "strangers": ({"network.clients": ["ward-7"]}, "network.clients: 'ward-7' is not enrolled"),
    "over-selection of all": ({"network.over_selection": 0.5}, "every round asks all 3 clients already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_between_machines_is_one_line(tmp_path, name):
    over, message = REFUSED[name]
    asked = experiment(tmp_path, **over)
    fleet = Fleet(tmp_path)
    with pytest.raises(ConfigError) as error:
        simulation.run(asked, place=fleet.place())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(asked.output).exists()


def test_labels_that_nobody_told_are_asked_for(tmp_path):
    from sheepfold.network.site import labelled

    (tmp_path / "test.jsonl").write_text(
        '{"instruction": "a", "output": "no"}\n{"instruction": "b", "output": "yes"}\n'
    )
    asked = runs.experiment(tmp_path, **{"task": "classification", "data.source": "private.jsonl", "data.rows": None})
    with pytest.raises(DataError, match=r"data.labels: between machines the labels must be told beforehand"):
        labelled(asked)
    data = asked.data.model_copy(update={"test_split": str(tmp_path / "test.jsonl")})
    assert labelled(asked.model_copy(update={"data": data})).data.labels == ("no", "yes")
    named = asked.model_copy(update={"data": asked.data.model_copy(update={"source": "cola"})})
    assert len(labelled(named).data.labels) == 2


NONSENSE = {
    "a deadline that nothing follows from": ({"deadline": 60}, "deadline 60 has no effect with quorum 1"),
    "late when nobody is": ({"late": "next"}, "late next has no effect with quorum 1"),
    "no quorum": ({"quorum": 0}, "network.quorum: found 0"),
    "too much quorum": ({"quorum": 1.5}, "network.quorum: found 1.5"),
    "less than everybody": ({"over_selection": -1}, "network.over_selection: found -1"),
    "a name twice": ({"clients": ["a", "a"]}, "clients names 'a' twice"),
    "nobody": ({"clients": []}, "network.clients: found"),
    "another word": ({"late": "wait"}, "network.late: found 'wait'"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_network_section_that_cannot_be_is_one_line(tmp_path, name):
    over, message = NONSENSE[name]
    with pytest.raises(ConfigError) as error:
        runs.experiment(tmp_path, network=over)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_trains_too_has_rows_of_its_own(tmp_path):
    from sheepfold.assets import corpus

    for name, rows in {"public": slice(-8, None), "test": slice(-12, -8)}.items():
        text = "".join(json.dumps(row) + "\n" for row in corpus.rows(110, seed=3)[rows])
        (tmp_path / f"{name}.jsonl").write_text(text)
    own = {"data.public": {"source": str(tmp_path / "public.jsonl")}, "federation.strategy": "fedkd"}
    own |= {"data.test_split": str(tmp_path / "test.jsonl")}
    distils = {"teacher": "builtin:tiny", "epochs": 1, "lr": 1e-3, "batch_rows": 4}
    asked = experiment(tmp_path, **own, **{"federation.strategy_args": {"fedkd": distils}})
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    fleet = Fleet(tmp_path)
    there = simulation.run(asked, place=fleet.place())
    told = fleet.charters[0].experiment["federation"]["strategy_args"]["fedkd"]
    assert told == {**distils, "teacher": "the server's"}  # no client has it, or looks for it
    assert there.adapter.hash() == here.adapter.hash()
    assert lines(there.folder)[-1]["teacher"] == pytest.approx(lines(here.folder)[-1]["teacher"], rel=1e-5)


def test_nobody_has_to_wait_for_a_machine_that_is_gone_for_good(tmp_path):
    asked = experiment(tmp_path, **{"federation.rounds": 3})
    fleet = Fleet(tmp_path, {"bob": Life(gone=((3.0, EVER),))})
    fleet.clock.until = 1000.0
    with pytest.raises(Stuck):
        simulation.run(asked, place=fleet.place())
    fleet.clock.until = 1e6
    patient = asked.model_copy(update={"network": asked.network.model_copy(update={"quorum": 0.6})})
    there = simulation.run(patient, resume=True, place=fleet.place(resume=True))
    assert there.state.round == 3
    assert there.state.counted == {"ann": 3, "bob": 1, "cleo": 3}
