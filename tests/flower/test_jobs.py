"""Jobs of a server: what both ends write, and how a dead coordinator is known."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.flower import certs, jobs
from sheepfold.flower.fold import Fold
from sheepfold.flower.keeper import rounds_done
from tests.flower.test_certs import run

WORKER = """
import sys, time
from pathlib import Path
from sheepfold.flower import jobs
with jobs.at_work(jobs.Job(Path(sys.argv[1])), int(sys.argv[2])):
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    made = Fold(tmp_path / "fold")
    certs.make(made, ["localhost"], 90)
    return made


def test_a_job_waits_with_what_it_was_asked(fold: Fold) -> None:
    first = jobs.submit(fold, {"name": "a b/c", "federation": {"rounds": 3}})
    second = jobs.submit(fold, {"name": "demo"}, resume=True, run="0" * 16)
    assert [job.id for job in jobs.every(fold)] == [first.id, second.id]
    assert jobs.status(first) == jobs.Status()
    assert jobs.asked(second) == jobs.Asked({"name": "demo"}, True, "0" * 16, str(Path.cwd()))
    assert len(jobs.asked(first).run) == 16
    assert jobs.find(fold, first.id) == first
    with pytest.raises(ConfigError, match="no job 'x'"):
        jobs.find(fold, "x")


def test_both_ends_change_their_part_of_a_status(fold: Fold) -> None:
    job = jobs.submit(fold, {"name": "demo"})
    jobs.update(job, state="running", flower_run=3, attempts=1)
    jobs.update(job, folder="runs/demo")
    assert jobs.status(job) == jobs.Status("running", "", 3, None, 1, "runs/demo")


def test_a_coordinator_that_is_killed_is_known_by_its_lock(fold: Fold) -> None:
    job = jobs.submit(fold, {"name": "demo"})
    jobs.update(job, state="running", flower_run=5)
    assert not jobs.is_worked_on(job)
    words = [sys.executable, "-c", WORKER, str(job.folder)]
    worker = subprocess.Popen([*words, "5"], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"at work\n"
        assert jobs.is_worked_on(job)
        assert jobs.status(job).pid == worker.pid
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert not jobs.is_worked_on(job)


def test_only_the_wanted_coordinator_works(fold: Fold) -> None:
    job = jobs.submit(fold, {"name": "demo"})
    jobs.update(job, state="running", flower_run=5)
    with pytest.raises(CheckpointError, match="no longer wanted"), jobs.at_work(job, 4):
        pass
    with jobs.at_work(job, 5):
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="another coordinator"), jobs.at_work(job, 5):
            pass
        assert time.monotonic() - began < 10
    jobs.update(job, state="done")
    with pytest.raises(CheckpointError, match="no longer wanted"), jobs.at_work(job, 5):
        pass


def test_stop_asks_the_one_job_there_is(fold: Fold, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is nothing to stop"):
        run("stop", "--fold", str(fold.path))
    first, second = (jobs.submit(fold, {"name": name}) for name in ("a", "b"))
    with pytest.raises(ConfigError, match=f"there are 2 to stop: {first.id}, {second.id}"):
        run("stop", "--fold", str(fold.path))
    run("stop", second.id, "--fold", str(fold.path))
    assert jobs.should_stop(second)
    assert not jobs.should_stop(first)
    jobs.update(second, state="stopped")
    run("stop", "--fold", str(fold.path))
    assert jobs.should_stop(first)
    with pytest.raises(ConfigError, match="is stopped already"):
        run("stop", second.id, "--fold", str(fold.path))


def test_a_damaged_job_is_named(fold: Fold) -> None:
    job = jobs.submit(fold, {"name": "a"})
    (job.folder / "job.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"job\.json"):
        jobs.asked(job)
    (job.folder / "status.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"status\.json"):
        jobs.status(job)


def test_status_shows_jobs_and_clients_however_they_are(fold: Fold, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.submit(fold, {"name": "demo", "federation": {"rounds": 3}})
    (jobs.submit(fold, {"name": "broken"}).folder / "job.json").write_text("[")
    run("status", "--fold", str(fold.path))
    out = capsys.readouterr().out
    assert "not running" in out
    assert "0/3" in out
    assert "damaged" in out
    run("status", "--fold", str(fold.path), "--json")
    assert '"state": "waiting"' in capsys.readouterr().out


def test_rounds_are_counted_by_the_journals_lines(tmp_path: Path) -> None:
    assert rounds_done(jobs.Status()) == 0
    assert rounds_done(jobs.Status(folder=str(tmp_path))) == 0
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    assert rounds_done(jobs.Status(folder=str(tmp_path))) == 2
    assert os.listdir(tmp_path) == ["rounds.jsonl"]
