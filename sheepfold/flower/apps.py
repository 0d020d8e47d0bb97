"""What the bundle names: Flower starts the first for each run, and never gets to start the second.

Flower finds these by the plain assignments below, in the module that is installed, not in the bundle.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from sheepfold.flower.bundle import CONFIG

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def coordinate(grid: Grid, context: Context) -> None:
    """Coordinate the run that the configuration names."""
    from sheepfold.flower.coordinator import coordinate

    coordinate(grid, str(context.run_config[CONFIG]), context.run_id)


@client_app.query()
def refuse(message: Message, context: Context) -> Message:
    """Raise RuntimeError: a node answers by its resident executor alone."""
    raise RuntimeError("this node runs no app of Flower's; start it with `sheepfold client node.yaml`")
