"""One closed model for all tests here, and one thread: models are tiny."""

import pytest

from sheepfold import simulation
from tests import small
from tests.offsite import bases


@pytest.fixture(autouse=True)
def one_thread():
    with small.one_thread():
        yield


@pytest.fixture(scope="session")
def closed(tmp_path_factory):
    """A closed model's folder."""
    return bases.saved(tmp_path_factory.mktemp("closed") / "secret-base")


@pytest.fixture(scope="session")
def lora(closed, tmp_path_factory):
    """A finished LoRA run."""
    with small.one_thread():
        return simulation.run(bases.run_of(closed, tmp_path_factory.mktemp("lora"), **{"stop.key": "loss.weighted"}))


@pytest.fixture(scope="session")
def whole(closed, tmp_path_factory):
    """A finished run that trained the adapter layers whole."""
    with small.one_thread():
        return simulation.run(bases.run_of(closed, tmp_path_factory.mktemp("whole"), **bases.FULL))
