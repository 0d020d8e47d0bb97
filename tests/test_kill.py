"""kill -9 at any moment and resume: the final adapter is the uninterrupted run's, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPTIONS = [
    "data.rows=96", "data.max_tokens=64", "data.partition.by=shards", "data.partition.clients=4", "adapter.rank=4",
    "adapter.dropout=0.1", "train.steps=6", "train.batch_rows=4", "federation.rounds=6",
    "federation.clients_per_round=3", "federation.strategy=fedavg", "stop.key=loss.weighted",
    "stop.patience=9", "baselines=[]",
    "evaluation.metrics=[]",
]  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen:
    words = [f"output={folder}/runs", f"cache={folder}/cache", *OPTIONS]
    command = [sys.executable, "-m", "sheepfold.cli", "run", "--json", *words, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def finish(process: subprocess.Popen) -> str:
    """Return the final adapter's hash."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])["adapter"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[str, float, Path]:
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))  # fills the token cache
    began = time.perf_counter()
    return finish(start(folder)), time.perf_counter() - began, folder


def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(uninterrupted, tmp_path):
    process = start(tmp_path)
    for line in process.stdout:
        if json.loads(line).get("round") == 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    journal = (tmp_path / "runs" / "demo" / "rounds.jsonl").read_text().splitlines()
    assert 4 <= len(journal) < 7
    assert finish(start(tmp_path, "--resume")) == uninterrupted[0]
    assert [
        json.loads(j)["round"] for j in (tmp_path / "runs" / "demo" / "rounds.jsonl").read_text().splitlines()
    ] == list(range(7))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_twenty_random_kills_change_no_bit(uninterrupted, tmp_path, trial):
    expected, seconds, _ = uninterrupted
    process = start(tmp_path)
    time.sleep(random.Random(trial).uniform(0.3, 1.0) * seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path / "runs" / "demo"
    if not (folder / "experiment.yaml").exists():  # killed before there was anything to resume
        assert finish(start(tmp_path)) == expected
        return
    assert finish(start(tmp_path, "--resume")) == expected
