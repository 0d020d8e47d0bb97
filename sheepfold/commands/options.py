"""What several commands ask for, and refuse, in the same words."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sheepfold.errors import ConfigError

Place = Annotated[
    str | None,
    typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="A run's folder, a PEFT folder or weights file, or a base."),
]
BaseName = Annotated[
    str | None, typer.Option("--base", help="The base: hub id, folder or builtin:tiny; default: what the run says.")
]
AdapterConfig = Annotated[
    Path | None, typer.Option(help="adapter_config.json, where it is not beside the adapter's weights.")
]
Template = Annotated[
    str | None, typer.Option(help="Prompt template, as in data.template; default: the run's own, else auto.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Bits = Annotated[
    int | None,
    typer.Option(help="8 or 4: load the base quantised (needs sheepfold[quant]); 0: as it is; default: as the run."),
]
Host = Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: a free one, which is printed.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the token that callers must bear, a page's password; else $SHEEPFOLD_TOKEN. Never an option "
        "itself: ps shows them."
    ),
]


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ConfigError for the first of these parameters that was given on the command line."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            raise ConfigError(f"{options[name]} has no effect {why}")
