"""`sheepfold models`: work on model weights."""

import re
from pathlib import Path
from typing import Annotated

import typer

from sheepfold.errors import ConfigError

app = typer.Typer(help="Work on model weights.", no_args_is_help=True, rich_markup_mode=None)


@app.command("apply-delta")
def apply_delta(
    base: Annotated[Path, typer.Option(help="Folder of the base's weights.")],
    delta: Annotated[Path, typer.Option(help="Folder of the delta's weights.")],
    target: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
) -> None:
    """Add a delta to a base, shard by shard: how Vicuna ships its weights."""
    from sheepfold import deltas

    deltas.apply_delta(base, delta, target)
    typer.echo(target)


@app.command("shrink")
def shrink(
    base: Annotated[str, typer.Argument(help="Hub id, folder or builtin:tiny.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    layers: Annotated[str, typer.Option(help="Layers to keep, counted from 0, in rising order: 1,3,5 or 0-3,8.")],
    layer_list: Annotated[
        str | None, typer.Option("--list", metavar="PATH", help="Path of the list of layers, where it is not found.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub base.")] = None,
) -> None:
    """Write a student of some of a model's layers, as DistilBERT's was made of BERT's; nothing is trained."""
    kept = indices(layers)
    from sheepfold import shrink as making

    made = making.shrink(
        base, out, kept, name=layer_list, revision=revision, say=lambda line: typer.echo(f"note: {line}", err=True)
    )
    typer.echo(
        f"layers {', '.join(map(str, kept))} of {made.of}, {made.after:,} of {made.before:,} parameters: {made.folder}"
    )


def indices(words: str) -> list[int]:
    """Return the numbers that '1,3,5' or '0-3,8' names, in the order named; raise ConfigError for other words."""
    found: list[int] = []
    for word in words.split(","):
        parts = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip(), re.ASCII)
        if parts is None:
            raise ConfigError(
                f"--layers {words!r}: {word.strip()!r} is no number from 0 and no range; write 1,3,5 or 0-3,8"
            )
        first, last = int(parts[1]), int(parts[2] or parts[1])
        if last < first:
            raise ConfigError(f"--layers {words!r}: the range {word.strip()} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    return found
