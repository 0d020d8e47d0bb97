"""Trackers are told what the journal says, once, whatever dies in between; and none of them can stop a run."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sheepfold import cli, simulation
from sheepfold.config import dump
from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.journal import RunFolder
from sheepfold.tracking import after, live
from sheepfold.tracking.after import track
from sheepfold.tracking.base import Follower
from sheepfold.tracking.journal_figures import scalars
from sheepfold.tracking.live import followed
from sheepfold.tracking.running import running, status
from tests import runs, small

EVALUATION = {
    "tasks": ["gsm8k"],
    "adapters": {
        "federated": {"hash": "x", "results": {"gsm8k": {"metrics": {"exact_match,strict": {"value": 0.25}}}}}
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """A run of three rounds with a closing table, and results of a benchmark."""
    folder = tmp_path_factory.mktemp("tracked")
    over = {"federation.rounds": 3, "baselines": ["local"], "model": {"base": str(base)}}
    with small.one_thread():
        path = simulation.run(runs.experiment(folder, **over)).folder
    (path / "eval").mkdir()
    (path / "eval" / "one.json").write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may write to."""
    return Path(shutil.copytree(finished, tmp_path / "small"))


def cut(run: Path, rounds: int) -> bytes:
    """Leave the journal as it was after a round, without what came at the end; return the whole one."""
    whole = (run / "rounds.jsonl").read_bytes()
    (run / "rounds.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[: rounds + 1]))
    return whole


def in_tensorboard(folder: str):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return events


def test_tensorboard_reads_back_what_the_journal_says(run):
    sent, place = track(run, "tensorboard", {})
    assert sent == 4
    events = in_tensorboard(place)
    for line in RunFolder(run).lines():
        for name, value in scalars(line).items():
            told = {e.step: e.value for e in events.Scalars(name)}
            assert told[line["round"]] == pytest.approx(value, rel=1e-6), name
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("eval/gsm8k/exact_match.strict/federated")[0].value == 0.25
    assert events.Scalars("closing/loss.own_rows.federated")[0].step == 3
    assert events.Histograms("clients/train_loss")[0].histogram_value.num == 4
    hashes = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("adapter/text_summary")]
    assert hashes == [line["adapter"] for line in RunFolder(run).lines()]


def test_tensorboard_goes_on_where_it_stopped_even_if_the_memory_came_too_late(run):
    whole = cut(run, 1)
    assert track(run, "tensorboard", {})[0] == 2
    memory = run / "tracking" / "tensorboard.json"
    early = memory.read_text()
    (run / "rounds.jsonl").write_bytes(whole)
    assert track(run, "tensorboard", {})[0] == 2
    memory.write_text(early)  # as if it had died between sending and remembering
    _, place = track(run, "tensorboard", {})
    assert track(run, "tensorboard", {})[0] == 0
    assert [e.step for e in in_tensorboard(place).Scalars("train/loss")] == [1, 2, 3]


def test_mlflow_reads_back_what_the_journal_says_and_no_round_twice(run, tmp_path):
    from mlflow import MlflowClient

    whole, store = cut(run, 1), {"dir": str(tmp_path / "store"), "project": "sheep"}
    _, first = track(run, "mlflow", store)
    memory = run / "tracking" / "mlflow.json"
    early = memory.read_text()
    (run / "rounds.jsonl").write_bytes(whole)
    track(run, "mlflow", store)
    memory.write_text(early)
    _, second = track(run, "mlflow", store)
    assert first == second
    client = MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    for name in scalars(RunFolder(run).lines()[-1]):
        told = {m.step: m.value for m in client.get_metric_history(first, name)}
        wanted = {line["round"]: scalars(line)[name] for line in RunFolder(run).lines() if name in scalars(line)}
        assert told == wanted, name
        assert len(client.get_metric_history(first, name)) == len(wanted), name
    made = client.get_run(first)
    assert (made.info.status, made.data.params["train.lr"]) == ("FINISHED", "0.003")
    assert made.data.tags["sheepfold.adapter"] == RunFolder(run).lines()[-1]["adapter"]
    assert made.data.metrics["eval/gsm8k/exact_match.strict/federated"] == 0.25
    assert client.get_experiment_by_name("sheep") is not None


def wandb_history(folder: Path) -> list[dict[str, object]]:
    """Return the history of every offline run in a folder, in order, once wandb's own process has written it all."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.parent.name):
        for record in ended_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return found


def ended_records(file: Path, patience_s: float = 20.0) -> list[Any]:
    """Return a run's records; its last, `exit`, may reach the disk a moment after `finish` has returned."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        records = [Record.FromString(content) for content in log_records(file.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file}: has no end after {patience_s:.0f} s")


def log_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Yield the records of a LevelDB log after wandb's seven bytes: checksum, length and kind before each piece."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # a block's last bytes hold no head
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):
            return  # a record that is being written
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""


def test_wandb_offline_holds_what_the_journal_says_and_goes_on_under_the_same_name(run):
    whole = cut(run, 1)
    _, first = track(run, "wandb", {"mode": "offline", "project": "sheep"})
    (run / "rounds.jsonl").write_bytes(whole)
    _, second = track(run, "wandb", {"mode": "offline"} | {"project": "sheep"})
    assert first == second
    history = wandb_history(run / "tracking")
    assert [h["round"] for h in history] == [0, 1, 2, 3]
    for told, line in zip(history, RunFolder(run).lines(), strict=True):
        assert told["adapter"] == line["adapter"]
        for name, value in scalars(line).items():
            assert told[name] == pytest.approx(value), name


def test_wandb_without_a_key_says_what_to_do(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="no key for Weights & Biases; `wandb login`, or set its mode to offline"):
        track(run, "wandb", {"mode": "online"})


def test_a_missing_library_is_one_line_before_anything_trains(tmp_path, monkeypatch):
    from sheepfold.tracking import base

    monkeypatch.setitem(base.LIBRARIES, "wandb", "no_such_library")
    with pytest.raises(ConfigError, match=r"tracker wandb needs .*pip install 'sheepfold\[wandb\]'"):
        simulation.run(runs.experiment(tmp_path, trackers=["wandb"]))
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_fails_is_said_twice_and_stops_nothing(tmp_path, base, capsys):
    (tmp_path / "file").write_text("in the way")
    over = {"trackers": ["tensorboard"], "tracker_args": {"tensorboard": {"dir": str(tmp_path / "file")}}}
    told = []
    with small.one_thread():
        outcome = simulation.run(
            runs.experiment(tmp_path, **over, model={"base": str(base)}),
            listener=lambda event, facts: told.append((event, facts)),
        )
    assert outcome.state.round == 2
    assert capsys.readouterr().err.count("sheepfold: tracker tensorboard: ") == 1
    assert "tensorboard" in dict(told)["end"]["failed_trackers"]
    assert (outcome.folder / "model_card.md").is_file()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_every_round_once(tmp_path, base):
    over = {"trackers": ["tensorboard"], "federation.rounds": 6, "model": {"base": str(base)}}
    experiment = runs.experiment(tmp_path, **over)
    (tmp_path / "experiment.yaml").write_text(dump(experiment))
    command = [sys.executable, "-m", "sheepfold.cli", "run", str(tmp_path / "experiment.yaml"), "--quiet"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    memory = tmp_path / "runs" / "small" / "tracking" / "tensorboard.json"
    while process.poll() is None and not (memory.is_file() and json.loads(memory.read_text())["round"] >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with small.one_thread():
        outcome = simulation.run(experiment, resume=True)
    assert json.loads(memory.read_text())["round"] == 6
    events = in_tensorboard(str(outcome.folder / "tracking" / "tensorboard"))
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_follower_leaves_out_files_that_are_no_results(run):
    (run / "eval" / "half.json").write_text("{bad")
    (run / "eval" / "lm.json").write_text(json.dumps({"results": {"arc_easy": {"acc,none": 0.5}}}))
    _, place = track(run, "tensorboard", {})
    assert in_tensorboard(place).Scalars("eval/arc_easy/acc")[0].value == 0.5
    (run / "eval" / "half.json").write_text(json.dumps(EVALUATION).replace("gsm8k", "whole"))
    track(run, "tensorboard", {})
    assert in_tensorboard(place).Scalars("eval/whole/exact_match.strict/federated")[0].value == 0.25


def events_of(run: Path, **arguments: dict[str, str]):
    """Return the run's experiment with these trackers, and the events that wake them."""
    experiment = (
        RunFolder(run).experiment().model_copy(update={"trackers": tuple(arguments), "tracker_args": arguments})
    )
    return experiment, [("start", {"folder": str(run)}), *(("round", line) for line in RunFolder(run).lines())]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RuntimeError, "FAILED"), (KeyboardInterrupt, "FAILED")]
)
def test_mlflow_is_told_how_the_run_ended(run, tmp_path, error, status):
    from mlflow import MlflowClient

    experiment, events = events_of(run, mlflow={"dir": str(tmp_path / "store")})
    with contextlib.suppress(error or ()), followed(experiment, lambda event, facts: None) as told:
        for event, facts in events:
            told(event, facts)
        if error:
            raise error
    client = MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    name = json.loads((run / "tracking" / "mlflow.json").read_text())["id"]
    assert client.get_run(name).info.status == status
    track(run, "mlflow", {})  # nothing is new but the status, where it was resumed since
    assert client.get_run(name).info.status == "FINISHED"


def test_wandb_is_told_that_a_run_failed(run):
    (run / "model_card.md").unlink()
    track(run, "wandb", {"mode": "offline"})
    [file] = (run / "tracking").glob("wandb/offline-run-*/*.wandb")
    assert ended_records(file)[-1].exit.exit_code == 1


class Hung:
    """A tracker whose server never answers."""

    last, id = None, "hung"

    def __init__(self, start):
        pass

    def round(self, *_):
        threading.Event().wait()


def test_ctrl_c_waits_once_and_shortly_for_all_trackers_that_hang(run, monkeypatch, capsys):
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setattr(f"sheepfold.tracking.{name}.begin", Hung)
    monkeypatch.setattr(live, "HURRY_S", 1.0)
    experiment, events = events_of(run, tensorboard={}, wandb={}, mlflow={})
    with contextlib.suppress(KeyboardInterrupt), followed(experiment, lambda event, facts: None) as told:
        for event, facts in events:
            told(event, facts)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 2.5  # one after the other would take 3
    err = capsys.readouterr().err
    assert err.count("did not send everything within 1 s; `sheepfold track` sends the rest") == 3
    assert "the run goes on" not in err


def test_a_run_goes_on_for_as_long_as_its_process_lives(run, monkeypatch):
    code = (
        f"from pathlib import Path; from sheepfold.tracking.running import running\n"
        f"with running(Path({str(run)!r})): print(flush=True); input()"
    )
    monkeypatch.setattr(after, "PAUSE_S", 0.05)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert status(run) == "open"
    with pytest.raises(CheckpointError, match="another process is at this run"), running(run):
        pass
    threading.Timer(0.3, process.kill).start()
    track(run, "tensorboard", {}, follow=True)
    assert process.wait() == -signal.SIGKILL
    assert status(run) == "finished"
    (run / "model_card.md").unlink()
    result = CliRunner().invoke(cli.app, ["track", str(run), "--to", "tensorboard", "--follow"])
    assert (result.exit_code, "stopped before its end; resume it" in result.output) == (0, True), result.output


def test_where_a_run_stands_is_the_same_in_a_copy_of_it(run):
    (run / "rounds.jsonl").touch()  # as a copy may have it: newer than the card
    assert status(run) == "finished"
    cut(run, 1)
    assert status(run) == "failed"


def test_a_run_leaves_no_lock_behind_however_it_ends(run):
    experiment, events = events_of(run)
    with contextlib.suppress(RuntimeError), followed(experiment, lambda event, facts: None) as told:
        told(*events[0])
        assert status(run) == "open"
        raise RuntimeError
    assert not list(run.glob(".running"))


def test_two_processes_do_not_send_one_run_twice(run):
    with Follower(RunFolder(run), "tensorboard", {}), pytest.raises(ConfigError, match="another process sends"):
        track(run, "tensorboard", {})


def test_a_journal_that_grows_is_read_from_where_it_stopped(run):
    whole = cut(run, 2)
    with Follower(RunFolder(run), "tensorboard", {}) as follower:
        assert follower.catch_up() == 3
        with open(run / "rounds.jsonl", "ab") as file:
            file.write(whole.splitlines(keepends=True)[3][:50])  # a line that is being written
        assert follower.catch_up() == 0
        with open(run / "rounds.jsonl", "ab") as file:
            file.write(whole.splitlines(keepends=True)[3][50:])
        assert follower.catch_up() == 1
        assert follower.catch_up() == 0


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"tracker_args": {"wandb": {"project": "x"}}}, "has no effect without trackers"),
        ({"trackers": ["wandb"], "tracker_args": {"wandb": {"projekt": "x"}}}, "projekt is unknown"),
        (
            {"trackers": ["wandb"], "tracker_args": {"wandb": {"mode": "ofline"}}},
            "is 'ofline'; it is online or offline",
        ),
        ({"trackers": ["wandb", "wandb"]}, "names one twice"),
        ({"trackers": ["neptune"]}, "trackers"),
    ],
)
def test_trackers_settings_that_cannot_work_are_one_line(tmp_path, over, message):
    with pytest.raises(ConfigError, match=message) as raised:
        runs.experiment(tmp_path, **over)
    assert "\n" not in str(raised.value)


def test_the_command_says_what_it_sent_and_follows_to_the_end(run):
    result = CliRunner().invoke(cli.app, ["track", str(run), "--to", "tensorboard", "--follow"])
    assert (result.exit_code, result.output.startswith("4 rounds sent to tensorboard: ")) == (0, True), result.output
