"""`sheepfold export`: take what a run made elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from sheepfold.commands.options import AdapterConfig, BaseName


def command(
    place: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run's folder, a PEFT folder or weights file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            help="peft: one adapter; merged: the whole model; gguf: the same for llama.cpp; adapters: all of a run's."
        ),
    ] = "peft",
    best: Annotated[bool, typer.Option("--best", help="The best evaluation's adapter, not the last round's.")] = False,
    client: Annotated[str | None, typer.Option(help="This client's own adapter, where clients have one.")] = None,
    dtype: Annotated[str, typer.Option(help="Number format of a merged model or a gguf.")] = "float32",
    base: BaseName = None,
    adapter_config: AdapterConfig = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="gguf: a llama.cpp checkout, whose converter then writes the file; default: $LLAMA_CPP."),
    ] = None,
) -> None:
    """Take a run's adapter elsewhere: as a PEFT folder, merged into the base, for llama.cpp, or all side by side."""
    from sheepfold.export import export

    folder = export(
        place,
        out,
        to=to,
        best=best,
        client=client,
        dtype=dtype,
        base=base,
        adapter_config=adapter_config,
        llama_cpp=llama_cpp,
        say=lambda line: typer.echo(f"note: {line}", err=True),
    )
    typer.echo(folder)
