"""However a shared run ends, it ends in all processes, soon, with one line; and it goes on in as many as one likes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sheepfold import simulation
from sheepfold.config import dump
from tests import small
from tests.devices.together import ROOT, ended, start
from tests.test_apart import tiny
from tests.test_stateful import METHODS, kept

SICK = """
import os

def rule(local, start):
    if os.environ.get("RANK") == "1":
        raise ValueError("a rule of one's own")
    return (local - start).square().flatten(1).sum(1)
"""


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.quick():
        yield


def experiment(folder: Path, base: Path, **over) -> tuple[Path, object]:
    made = tiny(folder, base, **over)
    file = folder / "experiment.yaml"
    file.write_text(dump(made))
    return file, made


def rounds(folder: Path) -> int:
    journal = folder / "runs" / "small" / "rounds.jsonl"
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_one_process_goes_on_with_it(base, tmp_path):
    long = METHODS["scaffold"] | {"federation.rounds": 60, "keep_rounds": None}
    file, _ = experiment(tmp_path, base, **long)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole = subprocess.Popen(
        [*torchrun, "-m", "sheepfold", "run", str(file), "--quiet"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while rounds(tmp_path) < 3 and whole.poll() is None:
            time.sleep(0.01)
        children = psutil.Process(whole.pid).children()
        [worker] = [child for child in children if child.environ().get("RANK") == "1"]
        worker.send_signal(signal.SIGKILL)
        out, err = whole.communicate(timeout=60)
    finally:
        whole.kill()
    assert whole.returncode == 1, err
    assert out == ""
    assert "exitcode  : -9" in err, "torchrun says who"
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    done = rounds(tmp_path)
    assert 3 <= done < 60
    short = {"federation.rounds": done + 2}
    going_on = simulation.run(tiny(tmp_path, base, **long | short), resume=True)
    at_once = simulation.run(tiny(tmp_path / "at once", base, **long | short))
    assert going_on.state.hash() == at_once.state.hash()
    assert kept(going_on) == kept(at_once)


@pytest.mark.slow
def test_what_goes_wrong_in_another_process_is_one_line_of_the_first_one(base, tmp_path):
    (tmp_path / "sick.py").write_text(SICK)
    file, _ = experiment(tmp_path, base, **{"train.local_rule": "sick:rule"})
    first, other = ended(start(["-m", "sheepfold", "run", str(file), "--json"], 2, cwd={0: tmp_path, 1: tmp_path}))
    line = "process 1 of 2: a rule of one's own (ValueError); its traceback is above"
    assert (first[0], first[2].splitlines()) == (2, [f"sheepfold: {line}"])
    assert (other[0], other[1]) == (1, "")
    assert other[2].strip().splitlines()[-1] == "ValueError: a rule of one's own"
    assert [json.loads(text)["event"] for text in first[1].splitlines()][-1] == "round"


@pytest.mark.slow
def test_processes_with_other_rows_are_told_so(base, tmp_path):
    for place, answer in (("one", "yes"), ("two", "no")):
        rows = [{"instruction": f"question {i}", "output": f"{answer} {i}"} for i in range(40)]
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.json").write_text(json.dumps(rows))
    file, _ = experiment(tmp_path, base, **{"data.source": "rows.json", "data.partition.by": "iid", "data.rows": None})
    places = {0: tmp_path / "one", 1: tmp_path / "two"}
    first, other = ended(start(["-m", "sheepfold", "run", str(file), "--quiet"], 2, cwd=places))
    said = "process 1 of 2 has another data than process 0: give all machines the same files"
    assert first == (2, "", f"sheepfold: {said}\n")
    assert other == (1, "", "")
