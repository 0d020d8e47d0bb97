"""`sheepfold server`, `enroll`, `status` and `stop`: the server's side of a run between machines."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sheepfold.errors import ConfigError, require

FoldOption = Annotated[Path, typer.Option(help="The server's folder, as `sheepfold certs` made it.")]
DEFAULT = Path("fold")


def server(
    fold: FoldOption = DEFAULT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one, which is printed.")] = 8443,
) -> None:
    """Be the server that enrolled clients join; runs until SIGTERM or Ctrl-C, and goes on where it was."""
    require("sheepfold server", "flower", "flwr")
    from sheepfold.flower import server as serving
    from sheepfold.flower.fold import Fold

    serving.serve(Fold(fold.resolve()), host, port, lambda line: typer.echo(line))


def enroll(
    public_key: Annotated[
        Path | None, typer.Argument(metavar="PUBKEY", help="The client's public key, a .pub file.")
    ] = None,
    name: Annotated[str, typer.Option(help="What the client is called in runs, such as ward-7.")] = "",
    fold: FoldOption = DEFAULT,
    remove: Annotated[bool, typer.Option("--remove", help="Strike the client off instead.")] = False,
) -> None:
    """Let a client join, by its public key; a running server knows it within a second."""
    require("sheepfold enroll", "flower", "flwr")
    from sheepfold.flower import registry
    from sheepfold.flower.fold import Fold

    if not name:
        raise ConfigError("--name is missing: what the client is called, such as --name ward-7")
    if remove:
        if public_key is not None:
            raise ConfigError(f"{public_key} has no effect with --remove, which goes by --name; remove it")
        registry.remove(Fold(fold), name)
        typer.echo(f"{name} is struck off; its key is refused from now on")
        return
    if public_key is None:
        raise ConfigError(f"PUBKEY is missing: `sheepfold enroll {name}.pub --name {name}`")
    registry.enroll(Fold(fold), name, public_key)
    typer.echo(f"{name} is enrolled; it needs {fold / 'ca.crt'} and the server's address")


def status(
    fold: FoldOption = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False,
) -> None:
    """Show who is there and what each does, how far runs are, and until when certificates hold."""
    require("sheepfold status", "flower", "flwr")
    from sheepfold.flower import overview
    from sheepfold.flower.fold import Fold

    found = overview.look(Fold(fold))
    if as_json:
        typer.echo(json.dumps(overview.as_dict(found), indent=2))
    else:
        overview.show(found)


def stop(
    job: Annotated[
        str | None, typer.Argument(help="As `sheepfold status` names it; default: the one there is.")
    ] = None,
    fold: FoldOption = DEFAULT,
) -> None:
    """End a run in good order, after what it is at; finished rounds are saved."""
    require("sheepfold stop", "flower", "flwr")
    from sheepfold.flower import jobs
    from sheepfold.flower.fold import Fold
    from sheepfold.locks import is_locked

    place = Fold(fold)
    place.require()
    going = [found.id for found in jobs.every(place) if not jobs.status(found).over]
    if job is None and not going:
        raise ConfigError(f"{fold}: no run is waiting or running; there is nothing to stop")
    if job is None and len(going) > 1:
        raise ConfigError(f"JOB is missing: there are {len(going)} to stop: {', '.join(going)}")
    asked = jobs.find(place, job or going[0])
    jobs.ask_to_stop(asked)
    when = "`sheepfold status` shows when it has"
    if not is_locked(place.lock):
        when = "no server is running, so it ends when one is started"
    typer.echo(f"{asked.id} was asked to stop; {when}")
