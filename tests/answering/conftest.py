"""One small run with adapters of clients' own, shared by the tests of this folder."""

from pathlib import Path

import pytest

from sheepfold import simulation
from sheepfold.answering.model import Answering, open_source
from sheepfold.answering.source import find
from tests.runs import experiment


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answering")
    asked = {
        "personal.finetune_steps": 2,
        "train.lr": 0.01,
        "stop.key": "loss.weighted",
        "adapter.targets": "all-linear",
    }
    return simulation.run(experiment(folder, **asked)).folder


@pytest.fixture(scope="package")
def answering(run):
    with open_source(find(run), "cpu") as opened:
        yield opened


@pytest.fixture
def ask(answering: Answering):
    """Return the prompt of a question."""
    from sheepfold.data.rows import Message

    return lambda text, new=8: answering.prompt([Message("user", text)], new)
