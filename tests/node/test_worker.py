"""A client machine, by what goes in and comes out: the bytes of one process's run, said before, and in the ledger."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from sheepfold import simulation
from sheepfold.node.ledger import Ledger
from sheepfold.peft_io import read_peft
from sheepfold.wire import blob
from sheepfold.wire.unpacking import unpack_letter
from tests import small
from tests.marks import mostly_slow
from tests.node.nodes import RUN_ID, experiment, lines


def figures(line):
    """Return what of a round's line does not depend on how fast machines are."""
    return {key: line.get(key) for key in ("cohort", "train_loss", "clients", "adapter", "uplink_bytes", "absent")}


METHODS = {
    "fedavg": {},
    "scaffold, int8": {"federation.strategy": "scaffold", "federation.wire": {"up": "int8", "down": "bf16"},
                       "federation.clients_per_round": 2, "federation.rounds": 4},
    "private modules": {"personal.keep_local": ["v_proj"], "train.engine": "peft_model",
                        "train.clients_per_pass": None},
}  # fmt: skip


@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["scaffold, int8"]))
def test_machines_come_to_what_one_process_comes_to_over_the_same_files(barn, tmp_path, method):
    asked = experiment(tmp_path, **METHODS[method])
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    there = simulation.run(asked, place=barn.place())
    assert there.adapter.hash() == here.adapter.hash()
    assert list(map(figures, lines(there))) == list(map(figures, lines(here)))
    for ours, theirs in zip(lines(here), lines(there), strict=True):  # clients share passes in one process
        assert theirs["held_out"]["clients"] == pytest.approx(ours["held_out"]["clients"], rel=1e-5)


@pytest.mark.slow
def test_a_machine_that_was_started_anew_goes_on_from_its_disk(barn, tmp_path):
    over = METHODS["scaffold, int8"] | {"federation.clients_per_round": 3}
    asked = experiment(tmp_path, **over)
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    place, stops = barn.place(), iter(range(100))

    def kill(client, kind, data):
        if next(stops) % 2:
            barn.restart(client)

    carrier = place.carrier
    place = replace(place, carrier=lambda charter: _watched(carrier(charter), kill))
    there = simulation.run(asked, place=place)
    assert there.adapter.hash() == here.adapter.hash()
    assert next(stops) > 12


def _watched(wire, before):
    wire.before = before
    return wire


def test_what_is_said_is_what_the_ledger_then_shows(barn, tmp_path):
    for wire in ("fp32", "int8"):
        run = RUN_ID[:-1] + ("a" if wire == "int8" else "b")
        asked = experiment(tmp_path, **{"federation.wire.up": wire, "baselines": ["local"]})
        simulation.run(asked, place=barn.place(run=run))
        machine = barn.workers["bob"].node
        told = json.loads((machine.runs / run / "leaving.json").read_text())
        entries = [e for e in Ledger(machine.ledger).entries() if e.run == run]
        assert [e.what for e in entries] == ["verdict", *["update", "verdict"] * 2, "verdict"]
        assert {e.bytes for e in entries if e.what == "update"} == {told["bytes_a_round"]}
        judged = [e.bytes for e in entries if e.what == "verdict"]
        evaluations, end = told["verdicts"]
        assert judged == [evaluations["bytes"]] * evaluations["times"] + [end["bytes"]]
        assert end["whom"] == ["base", "federated", "local"]
        assert sum(e.bytes for e in entries) == told["bytes_at_most"]
        answers = [answer for name, answer in barn.wires[-1].given if name == "bob"]
        assert [e.sha256 for e in entries] == [hashlib.sha256(a).hexdigest() for a in answers]
        update = next(a for a, e in zip(answers, entries, strict=True) if e.what == "update")
        _, sent = blob.read(update)
        assert {item["name"] for item in told["server_sees"]} == sent.keys() - {"measured"}
        for item in told["server_sees"]:
            assert item["bytes"] == sent[item["name"]].nbytes
            assert tuple(item["shape"]) == sent[item["name"]].shape
    assert sum("What bob sends in each round from round 1 on" in said for said in barn.said) == 2
    assert (machine.runs / run / "leaving.txt").read_text().count("adapter:model.") == len(told["server_sees"])


def test_what_leaves_is_told_again_where_it_takes_another_form(barn, tmp_path):
    over = {"federation.strategy": ["slora", "fedavg"], "federation.strategy_args": {"stage_rounds": 1, "density": 0.5}}
    barn.over["ann"] = {"policy": {"full_weights": True}}
    barn.restart("ann")
    asked = experiment(tmp_path, **over, **{"train.engine": "peft_model", "train.clients_per_pass": None})
    simulation.run(asked, place=replace(barn.place(), enrolled=["ann"]))
    folder = barn.workers["ann"].node.runs / RUN_ID
    first, then = (json.loads((folder / f"{n}.json").read_text()) for n in ("leaving", "leaving-from-round-2"))
    assert any(item["name"].endswith("/values") for item in first["server_sees"])
    assert all(item["name"].endswith(("/A", "/B")) for item in then["server_sees"])


def test_the_owner_goes_home_with_the_adapters(barn, tmp_path):
    asked = experiment(tmp_path, **{"personal.finetune_steps": 2})
    there = simulation.run(asked, place=barn.place())
    folder = barn.workers["cleo"].node.runs / RUN_ID
    assert read_peft(folder / "adapter").hash() == there.adapter.hash()
    assert small.gap(read_peft(folder / "adapter-personal"), there.adapter) > 0
    assert there.closing.joined == "personal"


def test_a_message_that_comes_again_is_answered_with_the_same_bytes(barn, told):
    charter, messages = told
    ann = barn.workers["ann"]
    data = next(data for kind, data in messages if kind == "train")
    again = [unpack_letter(ann.answer(charter, "train", data), RUN_ID)[0] for _ in range(2)]
    given = next(a for name, a in barn.wires[-1].given if name == "ann" and blob.read(a)[0]["message"] == "update")
    first = unpack_letter(given, RUN_ID)[0]
    for letter in again:
        assert letter.tensors.keys() == first.tensors.keys()
        assert all(torch.equal(t, first.tensors[n]) for n, t in letter.tensors.items())


def test_a_run_may_go_on_with_more_rounds_under_its_name(barn, told, tmp_path):
    charter, messages = told
    values = json.loads(charter)
    values["experiment"]["federation"]["rounds"] = 5
    data = next(data for kind, data in messages if kind == "train")
    assert blob.read(barn.workers["ann"].answer(json.dumps(values), "train", data))[0]["message"] == "update"


def test_a_new_run_with_the_same_base_does_not_load_it_again(barn, told, tmp_path):
    base = barn.workers["ann"]._bases._base
    asked = experiment(tmp_path, **{"adapter.rank": 2, "adapter.targets": "all-linear"})
    here = simulation.run(asked.model_copy(update={"name": "here"}))
    there = simulation.run(asked, place=barn.place(run="c" * 16))
    assert barn.workers["ann"]._bases._base is base
    assert f"run {'c' * 16}: {tmp_path / 'base'} is loaded already" in barn.said
    assert there.adapter.hash() == here.adapter.hash()
