"""kill -9 at any moment and resume: the final adapter is the uninterrupted run's, to the bit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sheepfold.adapter import Adapter
from sheepfold.local.store import ClientStore
from tests import small
from tests.runs import MEASURED, experiment

OPTIONS = [
    "data.rows=96", "data.max_tokens=64", "data.partition.by=shards", "data.partition.clients=4", "adapter.rank=4",
    "adapter.dropout=0.1", "train.steps=3", "train.batch_rows=2", "federation.rounds=6",
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
def whole(tmp_path_factory) -> tuple[str, Path]:
    """The final adapter's hash of an uninterrupted run, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return finish(start(folder)), folder


@pytest.fixture(scope="module")
def seconds(whole) -> float:
    """What an uninterrupted run takes that finds its tokens."""
    began = time.perf_counter()
    assert finish(start(whole[1])) == whole[0]
    return time.perf_counter() - began


def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(whole, tmp_path):
    process = start(tmp_path)
    for line in process.stdout:
        if json.loads(line).get("round") == 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    journal = (tmp_path / "runs" / "demo" / "rounds.jsonl").read_text().splitlines()
    assert 4 <= len(journal) < 7
    assert finish(start(tmp_path, "--resume")) == whole[0]
    assert [
        json.loads(j)["round"] for j in (tmp_path / "runs" / "demo" / "rounds.jsonl").read_text().splitlines()
    ] == list(range(7))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_twenty_random_kills_change_no_bit(whole, seconds, tmp_path, trial):
    expected, _ = whole
    process = start(tmp_path)
    time.sleep(random.Random(trial).uniform(0.3, 1.0) * seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path / "runs" / "demo"
    if not (folder / "experiment.yaml").exists():  # killed before there was anything to resume
        assert finish(start(tmp_path)) == expected
        return
    assert finish(start(tmp_path, "--resume")) == expected


# methods whose clients keep something: what they keep and the state must belong to the same round, whenever it ends

STATEFUL = {
    "scaffold": {"federation.strategy": "scaffold"},
    "fedadam x fedsa": {"federation.strategy": ["fedadam", "fedsa"]},
}
AHEAD = ["sheepfold.simulation", "transformers.models.llama.modeling_llama", "tests.test_kill"]
"""What a process has imported before it is one: kills cost a second then, and not six."""


def go(folder: Path, base: Path, strategy: dict, resume: bool) -> None:
    """Run or resume a small run of a stateful method, in a process of its own."""
    import torch

    from sheepfold import simulation

    torch.set_num_threads(1)
    over = {
        "model.base": str(base), "cache": str(base / "cache"), "data.rows": 40, "train.batch_rows": 2, "keep_rounds": 3,
        "federation.rounds": 8, "federation.clients_per_round": 2, "adapter.dropout": 0.1, "stop.key": "loss.weighted",
        "stop.patience": 99,
    }  # fmt: skip
    simulation.run(experiment(folder, **over, **strategy), resume=resume)


@pytest.fixture(scope="module")
def run_in_a_process(tmp_path_factory):
    """Return a function that starts a run in a process, and the base that all runs share."""
    base = small.saved(tmp_path_factory.mktemp("base"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(AHEAD)

    def begin(folder: Path, method: str) -> multiprocessing.Process:
        resume = (folder / "runs" / "small" / "experiment.yaml").exists()
        process = context.Process(target=go, args=(folder, base, STATEFUL[method], resume))
        process.start()
        return process

    return begin


def to_the_end(process: multiprocessing.Process) -> None:
    process.join(120)
    assert process.exitcode == 0


def left(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """Return a run's journal without its seconds, and hashes of its states and of what clients had after each round."""
    run = folder / "runs" / "small"
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    hashes = {}
    for path in (run / "state").glob("*.safetensors"):
        hashes[path.name] = path.read_bytes().hex()
    store = ClientStore(run / "clients")
    for client in (path.name for path in (run / "clients").iterdir()):
        for round in (3, 6, 8):  # those whose states are kept, and the last
            hashes[f"{client} after round {round}"] = Adapter(extra=store.get(client, round)).hash()
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines], hashes


@pytest.fixture(scope="module")
def unkilled(run_in_a_process, tmp_path_factory):
    """Return a function that gives what an uninterrupted run of a method leaves, and its seconds."""
    made = {}

    def find(method: str) -> tuple[Path, float]:
        if method not in made:
            folder = tmp_path_factory.mktemp("unkilled")
            to_the_end(run_in_a_process(tmp_path_factory.mktemp("first"), method))  # fills the token cache
            began = time.perf_counter()
            to_the_end(run_in_a_process(folder, method))
            made[method] = folder, time.perf_counter() - began
        return made[method]

    return find


def _lines(journal: Path) -> int:
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


def killed_and_resumed(begin, method: str, folder: Path, seconds: float, kills: int, draw: random.Random) -> int:
    """Kill a run as many times, each a random moment after a further round or two, and let it end.

    Returns how many of the kills hit a running one. It waits for the journal, so a busy machine kills no less.
    """
    hit, journal = 0, folder / "runs" / "small" / "rounds.jsonl"
    for _ in range(kills):
        until = _lines(journal) + draw.randint(1, 2)
        process = begin(folder, method)
        while process.is_alive() and _lines(journal) < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, seconds / 10))
        hit += process.is_alive()
        process.kill()
        process.join()
    to_the_end(begin(folder, method))
    return hit


@pytest.mark.slow
@pytest.mark.parametrize("method", STATEFUL)
def test_what_clients_keep_belongs_to_the_round_that_a_killed_run_resumes_from(
    method, run_in_a_process, unkilled, tmp_path
):
    expected, seconds = unkilled(method)
    draw = random.Random(method)
    assert killed_and_resumed(run_in_a_process, method, tmp_path, seconds, 3, draw) >= 1
    assert left(tmp_path) == left(expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", STATEFUL)
@pytest.mark.parametrize("trial", range(12))
def test_stateful_methods_survive_many_kills(method, trial, run_in_a_process, unkilled, tmp_path):
    expected, seconds = unkilled(method)
    draw = random.Random(f"{method} {trial}")
    killed_and_resumed(run_in_a_process, method, tmp_path, seconds, 1 + trial % 4, draw)
    assert left(tmp_path) == left(expected)
