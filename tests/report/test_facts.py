"""What a report knows is what the folder says."""

import json
import os
import shutil

import numpy as np
import pytest

from sheepfold.data.rows import ClientRows, FederatedData, Record, TokenRows
from sheepfold.errors import CheckpointError, ModelError
from sheepfold.facts import MOST_CATEGORIES, category_rows
from sheepfold.local.store import folder_name
from sheepfold.report import words
from sheepfold.report.adapters import read_adapter_facts
from sheepfold.report.facts import read_run
from tests.report.conftest import journal, renamed


def test_every_number_of_a_round_is_the_journals(ran, facts):
    lines = journal(ran)
    assert [r.round for r in facts.rounds] == [0, 1, 2]
    for line, told in zip(lines, facts.rounds, strict=True):
        assert told.loss == line["held_out"]["loss"]
        assert told.seconds == line["seconds"]
        assert told.train_loss == line.get("train_loss")
        assert (told.uplink_bytes, told.downlink_bytes) == (line.get("uplink_bytes", 0), line.get("downlink_bytes", 0))
        assert told.clients == len(line.get("clients", {}))
    assert facts.hash == lines[-1]["adapter"]
    assert facts.participants == {client for line in lines[1:] for client in line["clients"]}


def test_the_counts_of_categories_add_up_to_the_training_rows(facts):
    assert facts.table.clients == tuple(facts.clients)
    assert facts.table.rows.sum(axis=1).tolist() == [rows["train"] for rows in facts.clients.values()]
    assert len(facts.table.categories) > 1


def test_of_many_categories_the_frequent_are_counted_by_name_and_no_row_is_lost():
    """120 clients with a category of their own, and one category that all have."""
    records = [Record("q", "a", category=f"own {i // 2}" if i % 2 else "common") for i in range(240)]
    none = np.array([], dtype=np.int64)
    clients = {f"c{i}": ClientRows(np.array([2 * i, 2 * i + 1]), none, none) for i in range(120)}
    empty = TokenRows(none, none.astype(bool), np.zeros(1, dtype=np.int64), none, none.astype(bool))
    told = category_rows(FederatedData(records, clients, empty))
    assert len(told["names"]) == MOST_CATEGORIES
    assert told["names"][-1] == "(42 others)"
    assert told["rows"]["c119"] == {str(told["names"].index("common")): 1, "79": 1}
    assert sum(rows for held in told["rows"].values() for rows in held.values()) == 240


def test_ranks_and_sizes_of_adapters_are_those_of_the_files(ran, facts):
    assert {int(rank) for own in facts.data["ranks"].values() for rank in own} == {2, 4}
    assert set(facts.adapters) == {"federated", *(f"personal: client-{i}" for i in range(4))}
    federated, small = facts.adapters["federated"], facts.adapters["personal: client-0"]
    assert set(federated.ranks) == {4}
    assert set(small.ranks) == {2}
    assert small.numbers * 2 == federated.numbers
    assert federated.file_bytes == (ran / "adapter" / "adapter_model.safetensors").stat().st_size


def test_a_clients_adapter_has_the_clients_name(copied):
    folder = copied()
    renamed(folder, ("<b>a/b</b>", "n" * 200))
    for i, name in enumerate(("<b>a/b</b>", "n" * 200)):
        (folder / "personal" / f"client-{i}").rename(folder / "personal" / folder_name(name))
    names = [f"personal: {name}" for name in ("<b>a/b</b>", "n" * 200, "client-2", "client-3")]
    assert set(read_run(folder).adapters) == {"federated", *names}


def test_a_run_that_ended_is_finished(facts):
    assert (facts.phase, facts.done, facts.planned) == ("finished", 2, 2)
    assert facts.closing.shared_rows > 0


def test_an_older_run_has_no_categories_and_the_rest_of_its_facts(copied):
    folder = copied()
    data = json.loads((folder / "data.json").read_text())
    for key in ("categories", "ranks", "versions"):
        del data[key]
    (folder / "data.json").write_text(json.dumps(data))
    facts = read_run(folder)
    assert facts.table is None
    assert len(facts.rounds) == 3


def test_a_run_that_goes_on_after_its_end_is_training_again(copied):
    folder = copied(federation__rounds=5)
    facts = read_run(folder)
    assert facts.phase == "training"
    assert facts.closing is None
    assert facts.stale_closing


def test_a_closing_table_older_than_the_last_round_is_not_shown(copied):
    folder = copied()
    old = (folder / "rounds.jsonl").stat().st_mtime - 60
    os.utime(folder / "closing.json", (old, old))
    assert (read_run(folder).phase, read_run(folder).closing) == ("comparing", None)


def test_a_run_whose_benchmarks_are_to_come_is_being_judged(copied):
    folder = copied(evaluation__tasks=["perplexity:rows.jsonl"])
    facts = read_run(folder)
    assert facts.phase == "judging"
    assert facts.closing is not None
    assert "benchmarks are running" in words.status(facts)
    (folder / "eval").mkdir()
    written = folder / "eval" / "end-of-run.json"
    written.write_text("{}")
    assert read_run(folder).phase == "finished"
    old = (folder / "rounds.jsonl").stat().st_mtime - 60
    os.utime(written, (old, old))
    assert read_run(folder).phase == "judging"


def test_a_run_without_a_line_is_waiting_and_a_half_line_is_not_one(copied):
    folder = copied(keep=0)
    (folder / "rounds.jsonl").write_text('{"round": 0, "held_')
    for gone in ("closing.json", "data.json"):
        (folder / gone).unlink()
    facts = read_run(folder)
    assert (facts.phase, facts.rounds, facts.data, facts.best) == ("waiting", [], None, None)


def test_figures_that_were_not_finite_are_missing_and_not_zero(copied):
    def damage(line):
        line["held_out"]["loss"]["weighted"] = None if line["round"] == 2 else line["held_out"]["loss"]["weighted"]
        return line

    facts = read_run(copied(lines=damage))
    assert "weighted" not in facts.rounds[2].loss
    assert facts.best.round < 2


def test_a_further_measure_of_a_round_is_read_as_it_is_written(copied):
    def measured(line):
        line["held_out"]["accuracy"] = {"weighted": line["round"] / 10, "plain": 0.0}
        return line

    assert [r.metrics for r in read_run(copied(lines=measured)).rounds] == [{"accuracy": r / 10} for r in range(3)]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("experiment.yaml", "name: [", "not a run's folder"),
        ("rounds.jsonl", "{]\n", "a line is not JSON"),
        ("rounds.jsonl", '{"rounds": 1}\n', "a line is not one of a run"),
        ("rounds.jsonl", "[1]\n", "a line is not one of a run"),
        ("closing.json", "{}", "not a closing table"),
        ("data.json", "{", "cannot be read"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(copied, file, content, said):
    folder = copied()
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=said) as error:
        read_run(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_folder_tells_its_base_ranks_and_hash(ran, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(ran / "adapter", folder)
    (folder / "eval").mkdir()
    (folder / "eval" / "x.json").write_text('{"results": {"gsm8k": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}')
    facts = read_adapter_facts(folder)
    assert (facts.files.base, facts.files.method, facts.files.rank_text) == ("builtin:tiny", "LORA", "4")
    assert len(facts.files.sha256()) == 64
    assert [(b.task, b.measure, b.value, b.error) for b in facts.benchmarks] == [("gsm8k", "acc", 0.5, 0.1)]
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(ModelError, match="damaged"):
        read_adapter_facts(folder)
