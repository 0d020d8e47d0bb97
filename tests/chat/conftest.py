"""One small run, whose adapters answer otherwise than the base does."""

from pathlib import Path

import pytest

from sheepfold import simulation
from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from tests.runs import experiment


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Path:
    asked = {"personal.finetune_steps": 2, "train.lr": 0.01, "adapter.targets": "all-linear", "evaluation.every": 0}
    return simulation.run(experiment(tmp_path_factory.mktemp("chat"), **asked)).folder


@pytest.fixture(scope="package")
def answering(run):
    with open_source(find(run), "cpu") as opened:
        yield opened
