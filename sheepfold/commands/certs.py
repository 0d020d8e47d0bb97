"""`sheepfold certs`: a server's certificates, and nodes' keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sheepfold.commands.options import refuse
from sheepfold.errors import ConfigError, require

if TYPE_CHECKING:
    from sheepfold.flower.fold import Fold

DEFAULT = Path("fold")


def command(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLD]", help="The server's folder; with --node alone: where its keys go.")
    ] = DEFAULT,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address that nodes call; may be repeated; default: this machine's name."),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(help="Make this client's keys, FOLD/NAME.key and FOLD/NAME.pub; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(help="Days that the server's certificate holds.", min=1, max=3650)] = 365,
    renew: Annotated[
        bool, typer.Option("--renew", help="A new server certificate by the same CA; with --node: new keys.")
    ] = False,
    renew_ca: Annotated[
        bool, typer.Option("--renew-ca", help="The CA for ten years more; nodes must be sent its file.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Only show what is there, and until when it holds.")] = False,
) -> None:
    """Make a server's CA and certificate, or a client's keys: --node NAME alone makes nothing but those."""
    require("sheepfold certs", "flower", "flwr")
    from sheepfold.flower import certs
    from sheepfold.flower.fold import Fold

    fold = Fold(folder)
    _refuse(show, renew, renew_ca, bool(host), bool(node))
    if show or (node and not host):
        refuse(context, ["days"], "without a certificate to be made; remove it")
    if node:
        _keys(folder, node, renew)
    if show or not node or host:
        if not show:
            _certificates(fold, host or [], days, renew, renew_ca)
        for found in certs.read(fold):
            hosts = f" for {', '.join(found.hosts)}" if found.hosts else ""
            typer.echo(f"{found.path}: until {found.until:%Y-%m-%d}{hosts}; SHA-256 {found.fingerprint}")
            if line := found.warning():
                typer.echo(f"warning: {line}", err=True)


def _refuse(show: bool, renew: bool, renew_ca: bool, host: bool, node: bool) -> None:
    if show and (renew or renew_ca or host or node):
        raise ConfigError("--show makes nothing, so it goes with none of --renew, --renew-ca, --host and --node")
    if renew and renew_ca:
        raise ConfigError("--renew-ca makes a new server certificate too; remove --renew")
    if node and renew_ca:
        raise ConfigError(
            "--renew-ca has no effect on --node: nodes' keys are not signed by the CA; remove one of them"
        )


def _certificates(fold: "Fold", hosts: list[str], days: int, renew: bool, renew_ca: bool) -> None:
    import socket

    from sheepfold.flower import certs, registry

    if renew_ca:
        old = certs.renew_ca(fold, hosts, days)
        names = ", ".join(registry.nodes(fold)) or "none is enrolled yet"
        typer.echo(f"send {fold.ca} to every node before {old:%Y-%m-%d}, when the one that they have ends: {names}")
    elif renew:
        certs.renew(fold, hosts, days)
        typer.echo("no node needs to be touched; a running server takes it up by itself")
    else:
        certs.make(fold, hosts or [socket.gethostname()], days)


def _keys(folder: Path, names: list[str], renew: bool) -> None:
    from sheepfold.flower import keys, registry
    from sheepfold.folders import writing

    for name in names:
        private, public = folder / f"{registry.check_name(name)}.key", folder / f"{name}.pub"
        for path in (private, public):
            if path.exists() and not renew:
                raise ConfigError(f"{path}: is there already; --renew makes a new key, which must be enrolled anew")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            keys.make(private, public, name)
        typer.echo(f"{private}: stays on {name}'s machine")
        typer.echo(f"{public}: for `sheepfold enroll {public} --name {name}` on the server")
