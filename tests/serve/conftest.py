"""One small run, one server over it in a process of its own, and the same run in this process as the oracle."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch

from sheepfold import simulation
from sheepfold.answering.model import Answering, open_source
from sheepfold.answering.source import find
from tests import runs

TOKEN = "correct-horse-battery-staple"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SHEEPFOLD_TOKEN": TOKEN, "GOMP_SPINCOUNT": "2000"}
BODY_BYTES = 200_000
LIMITS = {"body-bytes": BODY_BYTES, "body-seconds": 1, "new-tokens": 1000, "rows": 8, "waiting": 40, "connections": 60}


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    """With /v1"""

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def resident(self) -> int:
        """Return the process's memory, in KiB."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=TOKEN, max_retries=0, timeout=30)

    def http(self, **headers: str) -> httpx.Client:
        own = {"Authorization": f"Bearer {TOKEN}"} | headers
        return httpx.Client(base_url=self.url.removesuffix("/v1"), headers=own, timeout=30)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "sheepfold.cli", "serve", *map(str, words)]


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients have adapters of their own, different enough to answer differently."""
    folder = tmp_path_factory.mktemp("serve")
    over = {"data.partition": {"by": "shards", "clients": 2}, "personal": {"finetune_steps": 4}, "train.lr": 2e-2}
    simulation.run(runs.experiment(folder, **over, **{"train.steps": 4}), listener=simulation.silent)
    return folder / "runs" / "small"


@pytest.fixture(scope="package")
def oracle(run: Path) -> Iterator[Answering]:
    """The same run, answering in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_source(find(run), "cpu") as answering:
        yield answering
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def server(run: Path) -> Iterator[Server]:
    """A live server with small limits; at the end it is told to stop in the middle of a stream, and must do so well."""
    words = [word for name, value in LIMITS.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(
        command(run, "--port", 0, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    line = process.stdout.readline()
    assert "serving small at http://127.0.0.1:" in line, line + process.stderr.read()
    yield (live := Server(process, re.search(r"http://\S+/v1", line)[0]))
    try:
        ends_well(live)
    finally:
        process.kill()


def ends_well(live: Server) -> None:
    """Check that SIGTERM in the middle of a stream ends stream and server, with nothing to complain about."""
    stream = live.client().completions.create(
        model="base", prompt="Once", max_tokens=1000, temperature=2, seed=1, stream=True
    )
    next(iter(stream))
    live.process.terminate()
    _, errors = live.process.communicate(timeout=30)
    assert live.process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "ERROR" not in errors
