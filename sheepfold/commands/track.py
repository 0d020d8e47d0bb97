"""`sheepfold track`: hand a journal to TensorBoard, Weights & Biases or MLflow."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; it may still be going on.")],
    to: Annotated[str, typer.Option(help="tensorboard, wandb or mlflow.")],
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the run has ended, or its process has.")] = False,
    project: Annotated[str | None, typer.Option(help="wandb: project; mlflow: experiment.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where files go, for trackers that write any.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="mlflow: the tracking server's address.")] = None,
    mode: Annotated[str | None, typer.Option(help="wandb: online or offline.")] = None,
    entity: Annotated[str | None, typer.Option(help="wandb: the user or team.")] = None,
) -> None:
    """Hand a run's journal to TensorBoard, Weights & Biases or MLflow; what was sent before is not sent again."""
    from sheepfold.tracking.after import track
    from sheepfold.tracking.running import status

    place = str(directory.resolve()) if directory else None
    asked = {"project": project, "dir": place, "uri": uri, "mode": mode, "entity": entity}
    sent, name = track(run, to, {k: v for k, v in asked.items() if v is not None}, follow=follow)
    if status(run) == "failed":
        typer.echo(f"note: {run}: stopped before its end; resume it, then track it again", err=True)
    typer.echo(f"{sent} rounds sent to {to}" + (f": {name}" if name else ""))
