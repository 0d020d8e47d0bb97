"""One small run, ready to be judged, for all tests of benchmarks."""

import pytest

from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from sheepfold.evaluation.benchmarks import catalogue
from sheepfold.evaluation.benchmarks.evaluate import evaluate
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.simulation import run
from tests.evaluation.benchmarks import data
from tests.runs import experiment
from tests.small import one_thread


@pytest.fixture(scope="package", autouse=True)
def _alone():
    with one_thread():
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A folder of benchmark data."""
    return data.write(tmp_path_factory.mktemp("benchmark-data"))


@pytest.fixture(scope="package")
def outcome(tmp_path_factory):
    """A run whose adapter changes what the base says."""
    over = {"train.lr": 0.05, "evaluation.rows_per_client": 1}
    return run(experiment(tmp_path_factory.mktemp("judged"), **over))


@pytest.fixture(scope="package")
def answering(outcome):
    with open_source(find(outcome.folder), "cpu") as opened:
        yield opened


@pytest.fixture(scope="package")
def judge(answering):
    """Evaluates by options, as the command does."""

    def judged(*tasks, names=("federated",), **options):
        settings = Settings(tasks=tasks, **options)
        return evaluate(answering, names, settings, catalogue.check(settings))

    return judged
