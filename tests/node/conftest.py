"""Three client machines, and a run that they have been through."""

import pytest

from sheepfold import simulation
from tests import small
from tests.node.nodes import Barn, experiment


@pytest.fixture
def barn(tmp_path):
    """Machines with a worker each; matrices are too small for two threads."""
    with small.one_thread():
        made = Barn(tmp_path)
        yield made
        made.close()


@pytest.fixture
def told(barn, tmp_path):
    """A finished run's charter and the messages of its server to one machine, by kind, in order."""
    simulation.run(experiment(tmp_path), place=barn.place())
    wire = barn.wires[-1]
    return wire.charter, [(kind, data) for client, kind, data in wire.sent if client == "ann"]
