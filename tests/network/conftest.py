from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.network import servers


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A server that many tests share: they may call it as they like, and leave it as it was."""
    with servers.running(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[servers.Server]:
    """A server of one test's own, to be killed and stopped."""
    with servers.running(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Runs in this process have one thread, as those of the processes that tests start: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
