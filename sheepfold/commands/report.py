"""`sheepfold report`: one HTML file about a run, or several."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sheepfold.commands.options import refuse
from sheepfold.errors import ConfigError, require


def command(
    context: typer.Context,
    places: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders, or one adapter folder.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the run's folder, or beside several.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="An adapter folder's base: checked, and shown beside the folder's own.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the page and keep it up to date while runs go on.")
    ] = False,
    host: Annotated[str, typer.Option(help="Where --live listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of --live; 0: any that is free.")] = 8765,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write one HTML file about a run, or several compared."""
    require("sheepfold report", "report", "plotly", *(["starlette", "uvicorn"] if live else []))
    mere = [place for place in places if _is_mere_adapter(place)]
    if mere and (live or len(places) > 1):
        raise ConfigError(f"{mere[0]}: an adapter folder; report takes one alone, without --live, or runs")
    if base and not mere:
        raise ConfigError(f"--base {base} has no effect on a run, which names its own; remove it")
    if not live:
        refuse(context, ("host", "port"), "without --live, which alone listens; remove it")
    if live and out:
        raise ConfigError(f"--out {out} has no effect with --live, which writes no file; remove one of them")
    if live:
        _serve(places, host, port, show)
        return
    target = out or (places[0] if len(places) == 1 else places[0].resolve().parent) / "report.html"
    _write(*_content(places, base), target)
    typer.echo(target)
    if show:
        typer.launch(target.resolve().as_uri())


def _is_mere_adapter(place: Path) -> bool:
    return (place / "adapter_config.json").is_file() and not (place / "experiment.yaml").exists()


def _content(places: list[Path], base: str | None) -> tuple[str, str]:
    from sheepfold.report import page
    from sheepfold.report.adapters import read_adapter_facts
    from sheepfold.report.facts import read_run

    if _is_mere_adapter(places[0]):
        return places[0].resolve().name, page.of_adapter(read_adapter_facts(places[0], base))
    runs = [read_run(place) for place in places]
    return page.name(runs), page.content(runs)


def _write(title: str, inside: str, target: Path) -> None:
    from sheepfold.folders import replace_file, writing
    from sheepfold.report import page

    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"--out {target}: expected a file's name in a folder that exists")
    with writing(target):
        replace_file(target, page.whole(title, inside).encode())


def _serve(places: list[Path], host: str, port: int, show: bool) -> None:
    from sheepfold.report import live

    def ready(address: str) -> None:
        typer.echo(f"the report is at {address} (Ctrl-C ends)")
        if host not in live.LOOPBACK:
            typer.echo(f"note: whoever reaches {host} can read it; it asks for no password", err=True)
        if show:
            typer.launch(address)

    live.serve(places, os.fspath(host), port, ready)
