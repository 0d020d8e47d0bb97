from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sheepfold.assets import corpus
from tests.network import servers
from tests.network.federation import THREE, Federation, write_rows


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


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server with three clients who are there."""
    folder = tmp_path_factory.mktemp("federation")
    rows = iter(corpus.rows(sum(THREE.values()), seed=3))
    with Federation(folder, list(THREE)) as made:
        made.server.start()
        (folder / "rows").mkdir()
        for name, count in THREE.items():
            own = [next(rows) for _ in range(count)]
            write_rows(folder / "rows" / f"{name}.jsonl", own)
            made.node(name, own)
            made.join(name)
        made.there()
        yield made
