"""`sheepfold chat`: talk to what a run made, in a browser or the terminal."""

import threading
from typing import Annotated

import typer

from sheepfold.commands.options import (
    AdapterConfig,
    BaseName,
    Bits,
    Device,
    Host,
    Place,
    Port,
    Template,
    TokenFile,
    refuse,
)


def command(
    context: typer.Context,
    place: Place = None,
    base: BaseName = None,
    adapter_config: AdapterConfig = None,
    template: Template = None,
    device: Device = "auto",
    bits: Bits = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Talk here, without a page.")] = False,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    token_file: TokenFile = None,
    browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in a browser.")] = False,
) -> None:
    """Talk to what a run made, in a browser or the terminal: base and federated answers side by side."""
    if terminal:
        page = ("host", "port", "token_file", "browser")
        refuse(context, page, "with --terminal, which has no page; remove one of them")
    else:
        from sheepfold.chat import serving

        port, token = serving.place(host, port, token_file)  # before a model is loaded
    from sheepfold.answering.model import open_source
    from sheepfold.answering.source import find

    try:
        with open_source(
            find(place, base=base, adapter_config=adapter_config, template=template), device, bits
        ) as answering:
            if terminal:
                from sheepfold.chat.terminal import talk

                talk(answering)
            else:
                url = serving.launch(answering, host, port, token, browser)
                typer.echo(f"{url} (Ctrl-C ends it)")
                threading.Event().wait()
    except KeyboardInterrupt:
        raise typer.Exit(130 if terminal else 0) from None
