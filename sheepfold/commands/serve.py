"""`sheepfold serve`: an OpenAI-compatible endpoint."""

from typing import Annotated

import typer

from sheepfold.commands.options import AdapterConfig, BaseName, Bits, Device, Host, Place, Port, Template, TokenFile


def command(
    place: Place = None,
    base: BaseName = None,
    adapter_config: AdapterConfig = None,
    template: Template = None,
    device: Device = "auto",
    bits: Bits = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 2048,
    rows: Annotated[int, typer.Option(help="Most rows of one request: prompts times n times beams.")] = 64,
    waiting: Annotated[int, typer.Option(help="Most requests that wait for the model; more get 429.")] = 32,
    seconds: Annotated[float, typer.Option(help="Longest time for one request, waiting included.")] = 300,
    body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 4 * 2**20,
    body_seconds: Annotated[float, typer.Option(help="Longest time to receive a request, or to take a reply.")] = 20,
    connections: Annotated[int, typer.Option(help="Most connections open at once.")] = 256,
    access_log: Annotated[bool, typer.Option("--access-log", help="Write a line for each request.")] = False,
) -> None:
    """Serve a base and its adapters to OpenAI clients: chat and plain completions, streamed or whole."""
    from sheepfold import listening
    from sheepfold.errors import require

    require("sheepfold serve", "serve", "fastapi", "uvicorn")
    from sheepfold.serve import server
    from sheepfold.serve.limits import Limits

    limits = Limits(
        body_bytes=body_bytes,
        new_tokens=new_tokens,
        rows=rows,
        waiting=waiting,
        seconds=seconds,
        body_seconds=body_seconds,
        connections=connections,
    )
    token = listening.read_token(token_file)
    with listening.bind(host, port) as taken:
        listening.check_open(host, taken, token)
        from sheepfold.answering.model import open_source
        from sheepfold.answering.source import find

        try:
            source = find(place, base=base, adapter_config=adapter_config, template=template)
            with open_source(source, device, bits) as answering:
                server.serve(
                    answering,
                    taken,
                    limits,
                    token=token,
                    hosts=listening.hosts_of(host, token),
                    say=lambda line: typer.echo(line, err=False),
                    access_log=access_log,
                )
        except KeyboardInterrupt:  # while the model was loaded
            raise typer.Exit(130) from None
