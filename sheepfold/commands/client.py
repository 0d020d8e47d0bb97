"""`sheepfold client`: take part in a server's runs."""

import time
from pathlib import Path
from typing import Annotated

import typer


def command(
    node: Annotated[Path, typer.Argument(metavar="NODE.yaml", help="This machine's own file.")],
) -> None:
    """Take part in a server's runs with this machine's rows, as its own file and policy allow. Ends on Ctrl-C."""
    from sheepfold.errors import require
    from sheepfold.node.settings import read_node

    settings = read_node(node)
    require("sheepfold client", "flower", "flwr")
    from sheepfold.flower import client

    client.run(settings, lambda line: typer.echo(f"{time.strftime('%H:%M:%S')} {line}"))
