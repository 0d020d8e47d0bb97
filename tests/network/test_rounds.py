"""Whole runs between processes: a server and three clients, over TLS, each with its key."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from sheepfold import simulation
from sheepfold.flower import jobs
from tests.network.federation import Federation
from tests.network.servers import environment, program, until
from tests.runs import experiment

pytestmark = pytest.mark.network

OPTIONS: dict[str, Any] = {
    "train.clients_per_pass": 1, "federation.rounds": 3, "data.rows": None, "data.partition": {"by": "files"},
}  # fmt: skip


def asked(folder: Path, **over: Any) -> Any:
    return experiment(folder, **{**OPTIONS, "data.source": str(folder / "rows"), **over})


def test_three_rounds_between_processes_come_to_the_bits_of_one_process(federation: Federation) -> None:
    whole = asked(federation.folder)
    run = federation.run(whole.model_dump(mode="json"))
    lines = run.finish()
    here = simulation.run(whole)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["adapter"] == here.state.hash()
    assert "round 3" in run.said()
    assert str(run.folder) in run.said()


def test_held_out_figures_and_the_closing_table_are_those_of_one_process(federation: Federation) -> None:
    more = {"federation.rounds": 1, "baselines": ["local"], "evaluation.batch_rows": 1}
    whole = asked(federation.folder, **more)
    run = federation.run(whole.model_dump(mode="json"))
    there = run.finish()
    here = simulation.run(whole)
    journal = [json.loads(line) for line in (here.folder / "rounds.jsonl").read_text().splitlines()]
    for mine, theirs in zip(there, journal, strict=True):
        assert mine["held_out"]["loss"] == pytest.approx(theirs["held_out"]["loss"], rel=1e-6)
    table, same = (json.loads((folder / "closing.json").read_text()) for folder in (run.folder, here.folder))
    for rows, scores in table["scores"]["loss"].items():  # nobody judges one client's own adapter on another's rows
        assert scores == pytest.approx({who: same["scores"]["loss"][rows][who] for who in scores}, rel=1e-6)
    assert table["scores"]["loss"].keys() == same["scores"]["loss"].keys()
    assert "Joining beat training alone" in run.said()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(federation: Federation) -> None:
    whole = asked(federation.folder, name="stopped")
    run = federation.run(whole.model_dump(mode="json"))
    run.reach(1)
    fold = ["--fold", str(federation.fold.path)]
    said = subprocess.run([program("sheepfold"), "stop", *fold], env=environment(), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert run.process.wait(60) == 130
    assert "go on with --resume" in run.said()
    again = federation.run(whole.model_dump(mode="json"), "--resume")
    assert again.process.wait(300) == 0, again.said()
    lines = (federation.folder / "runs" / "stopped" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
    assert json.loads(lines[-1])["adapter"] == simulation.run(whole).state.hash()


def test_ctrl_c_leaves_the_run_going_and_a_killed_coordinator_is_resumed(federation: Federation) -> None:
    whole = asked(federation.folder, name="left", **{"federation.rounds": 6})  # more than pass while a machine is busy
    run = federation.run(whole.model_dump(mode="json"))
    run.reach(1)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(30) == 130
    assert "goes on at the server" in run.said()
    [job] = [job for job in jobs.every(federation.fold) if job.id.endswith("-left")]
    os.kill(jobs.status(job).pid, signal.SIGKILL)
    until(lambda: jobs.status(job).over, 300, "the run to end")
    assert jobs.status(job).state == "done", jobs.status(job)
    assert jobs.status(job).attempts == 2
    lines = (federation.folder / "runs" / "left" / "rounds.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["adapter"] == simulation.run(whole).state.hash()


@pytest.mark.parametrize(
    ("over", "words", "said"),
    [
        ({"network.clients": ["ann", "zoe"]}, [], "network.clients: 'zoe' is not enrolled"),
        ({"data.public.share": 0.1}, [], "data.public.share 0.1: between machines"),
        ({"name": "never"}, ["--resume"], "no run to resume"),
        ({}, ["--resume-from", "1"], "--resume-from: a run on flower goes on from its newest round"),
    ],
)
def test_what_cannot_be_between_machines_is_told_before_anything_is_asked(
    federation: Federation, over: dict[str, Any], words: list[str], said: str
) -> None:
    before = len(jobs.every(federation.fold))
    run = federation.run(asked(federation.folder, **over).model_dump(mode="json"), *words)
    assert run.process.wait(60) == 2
    assert said in run.said()
    assert run.said().count("\n") == 1
    assert len(jobs.every(federation.fold)) == before
