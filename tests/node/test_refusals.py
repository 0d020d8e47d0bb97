"""What a client machine does not answer with an update: one line why, and nothing of its own in it."""

import json
import re
import shutil

import pytest
import torch

from sheepfold import simulation
from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.messages import Absence
from sheepfold.network.site import site
from sheepfold.node.ledger import Ledger
from sheepfold.node.worker import Worker
from sheepfold.wire import blob
from sheepfold.wire.unpacking import unpack_letter
from tests import small
from tests.marks import mostly_slow
from tests.node.nodes import RUN_ID, experiment, lines, node

REFUSED = {
    "a rank": ({"adapter.rank": 8}, {"max_rank": 4}, r"refused: the experiment asks for adapter.rank 8, .* max_rank 4"),
    "rows": ({"train.steps": None, "train.epochs": 2}, {"rows_per_round": 10}, r"refused: .* rows 28, .* rows_per_"),
    "answers": ({"evaluation.metrics": ["exact_match"]}, {}, r"refused: .* exact_match, .* generation false"),
    "a base": ({}, {"models": ["owner/base"]}, r"refused: .* model.base .*, .* models \[owner/base\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", mostly_slow(REFUSED, quick=["a rank", "answers"]))
def test_a_policy_refuses_before_anything_is_loaded_and_the_run_goes_on_without(barn, tmp_path, monkeypatch, case):
    over, policy, why = REFUSED[case]
    if case == "answers":
        over = over | {"evaluation.rows_per_client": 1, "federation.rounds": 1}
        for other in ("ann", "cleo"):
            barn.over[other] = {"policy": {"generation": True}}
            barn.restart(other)
    barn.over["bob"] = {"policy": policy}
    barn.restart("bob")
    there = simulation.run(experiment(tmp_path, **over), place=barn.place())
    absent = [line["absent"] for line in lines(there) if line["round"]]
    assert all(reasons.keys() == {"bob"} for reasons in absent)
    assert re.search(why, absent[0]["bob"]), absent[0]["bob"]
    machine = barn.workers["bob"]
    assert machine._bases._base is None, "nothing heavy was loaded"
    assert not (machine.node.runs / RUN_ID / "clients").exists()
    assert {e.what for e in Ledger(machine.node.ledger).entries()} == {"absence"}


def reason(worker: Worker, charter: str, kind: str, data: bytes, run: str = RUN_ID) -> Absence:
    """Return the absence that a message is answered with."""
    letter, _ = unpack_letter(worker.answer(charter, kind, data), run)
    assert isinstance(letter, Absence)
    assert letter.client == worker.node.name
    assert "\n" not in letter.reason
    return letter


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"batch_devices": ["cpu", "cuda:77"]}, "train.batch_devices: between machines each client trains on its own"),
        ({"sharding": "fsdp"}, "train.sharding fsdp: between machines each client trains in one process; remove it"),
    ],
)
def test_devices_are_each_machines_own_to_say(barn, told, tmp_path, over, said):
    with pytest.raises(ConfigError, match=said):
        site(experiment(tmp_path, train=over), ["ann"])
    charter, messages = told
    facts = json.loads(charter)
    facts["experiment"]["train"] |= {"engine": "peft_model", **over}  # a server's that does not look
    facts["experiment"]["train"]["clients_per_pass"] = None
    assert said in reason(barn.restart("ann"), json.dumps(facts), *messages[0]).reason


def test_what_cannot_be_answered_is_an_absence_with_a_reason(barn, told):
    charter, messages = told
    ann, bob = barn.workers["ann"], barn.workers["bob"]
    train = next(data for kind, data in messages if kind == "train")
    judge = next(data for kind, data in messages if kind == "judge")
    values = json.loads(charter)
    over = lambda **new: json.dumps({**values, **new})  # noqa: E731
    old = over(version="0.0.1")
    assert "the server has sheepfold 0.0.1, this machine" in reason(ann, old, "train", train).reason
    other = over(run="f" * 16)
    assert f"a message of run '{RUN_ID}', expected {'f' * 16}" in reason(ann, other, "train", train, "f" * 16).reason
    wrong = over(run="f" * 16, base="0" * 32)
    assert "has fingerprint" in reason(barn.restart("ann"), wrong, "train", train, "f" * 16).reason
    ann = barn.workers["ann"]
    assert "it is truncated" in reason(ann, charter, "train", train[:-100]).reason
    damaged = bytearray(train)
    damaged[-1] ^= 1
    assert "damaged on the way" in reason(ann, charter, "train", bytes(damaged)).reason
    assert "an assignment of 'ann', and this machine is bob" in reason(bob, charter, "train", train).reason
    assert "an exam of 'ann', and this machine is bob" in reason(bob, charter, "judge", judge).reason
    assert "expected assignment" in reason(ann, charter, "train", judge).reason
    assert "expected exam" in reason(ann, charter, "close", train).reason
    assert "kind 'run', expected train, judge, close" in reason(ann, charter, "run", train).reason
    assert "no charter of a run" in reason(ann, "[", "train", train).reason
    assert "expected 16 hex digits" in reason(ann, over(run="../../../etc/x"), "train", train).reason
    strangers = over(run="e" * 16, clients=["bob"])
    assert "the run's clients are 1 others" in reason(ann, strangers, "train", train, "e" * 16).reason
    changed = over(experiment={**values["experiment"], "seed": 5})
    assert (
        f"run {RUN_ID}: seed was 0 and is now 5; a run has one charter" in reason(ann, changed, "train", train).reason
    )
    values["experiment"]["federation"]["rounds"] = 1
    later = [data for kind, data in messages if kind == "train"][-1]
    assert "an assignment of round 2, and the run's charter has 1" in reason(ann, over(), "train", later).reason
    last = [data for kind, data in messages if kind == "judge"][-1]
    assert "a state after round 2, and the run's charter has 1" in reason(ann, over(), "close", last).reason
    fewer = over(clients=["ann"])
    assert "clients was ('ann', 'bob', 'cleo') and is now ('ann',)" in reason(ann, fewer, "train", train).reason
    assert dict(ann.state) == {"phase": "idle", "doing": "waiting"}


def test_what_goes_wrong_here_stays_here(barn, told, monkeypatch):
    charter, messages = told
    ann = barn.workers["ann"]
    data = next(data for kind, data in messages if kind == "train")

    def broken(assignments):
        raise ValueError("row 3: 'a secret' in /home/ann/rows.jsonl")

    monkeypatch.setattr(ann._run.parts.engine, "train", broken)
    assert reason(ann, charter, "train", data).reason == "ValueError on this machine; its own log has the rest"
    assert "a secret" in ann.node.log.read_text()

    ann.answer(charter, "train", data)  # which loads the run again

    def full(assignments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ann._run.parts.engine, "train", full)
    assert reason(ann, charter, "train", data).reason.startswith("out of memory; set data.max_tokens")
    assert blob.read(ann.answer(charter, "train", data))[0]["message"] == "update"


def test_rows_that_cannot_be_used_are_not_quoted(barn, tmp_path):
    (tmp_path / "rows" / "bob.jsonl").write_text('{"instruction": "the secret", "reply": "x"}\n')
    there = simulation.run(experiment(tmp_path), place=barn.place())
    absent = next(line["absent"] for line in lines(there) if line["round"])
    assert absent == {"bob": "this machine's rows cannot be used as the experiment asks; its own log says why"}
    assert "no column for output" in barn.workers["bob"].node.log.read_text()


def test_a_machine_may_have_its_own_copy_of_the_base_and_no_other_one(barn, tmp_path):
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    small.saved(tmp_path / "other", "mistral")
    for name, base in {"ann": "copy", "bob": "other"}.items():
        barn.over[name] = {"model": str(tmp_path / base)}
        barn.restart(name)
    there = simulation.run(experiment(tmp_path), place=barn.place())
    absent = next(line["absent"] for line in lines(there) if line["round"])
    assert absent.keys() == {"bob"}
    assert re.search(
        r"this machine's has fingerprint \w{32}, the run's \w{32}; both need the same files", absent["bob"]
    )
    assert str(tmp_path) not in absent["bob"]


def test_two_processes_do_not_share_a_folder(barn, tmp_path):
    with pytest.raises(CheckpointError, match="another process works in it; stop that one first"):
        Worker(node(tmp_path, "ann"))


def test_nothing_leaves_that_the_ledger_cannot_note(barn, told):
    charter, messages = told
    ann = barn.workers["ann"]
    ann.node.ledger.unlink()
    ann.node.ledger.mkdir()
    with pytest.raises(CheckpointError, match="cannot be kept"):
        ann.answer(charter, *messages[0])
