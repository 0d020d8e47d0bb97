"""`sheepfold offsite`: what the owner of a closed model hands out."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    experiment: Annotated[str, typer.Argument(help="Experiment file, or a recipe's name, with an `offsite` section.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Options over the experiment's.")
    ] = None,
) -> None:
    """Write the emulator of a closed model: a smaller model, which is all that clients get (docs/offsite.md)."""
    from sheepfold.config import load
    from sheepfold.errors import ConfigError

    asked = load(experiment, options or [])
    if asked.offsite is None:
        raise ConfigError(f"{experiment}: no offsite section; set at least offsite.emu_r, or take another file")
    from sheepfold.models import config_only, load_tokenizer
    from sheepfold.offsite import align, emulator

    if asked.offsite.align is not None:
        align.check(asked.offsite.align)
    emulator.outlined(config_only(asked.model).model, asked.offsite)  # refused before the heavy part
    tokenizer = load_tokenizer(asked.model)
    made = emulator.write(asked, out, tokenizer, align.read_rows(asked, tokenizer))
    typer.echo(f"{out}: {made.line()}")
