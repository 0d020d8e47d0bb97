"""The command line. Heavy imports wait inside the commands, so that --help answers at once."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sheepfold.commands import (
    certs,
    chat,
    client,
    evaluate,
    export,
    finetune,
    models,
    offsite,
    report,
    serve,
    server,
    track,
)
from sheepfold.devices import group
from sheepfold.errors import SheepfoldError

app = typer.Typer(
    name="sheepfold",
    help="Federated fine-tuning of large language models: data stays in its fold, only adapters travel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
data_app = typer.Typer(help="Look at data before anything trains on it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(models.app, name="models")


UsageError: Any = typer.BadParameter.__mro__[1]
"""What typer raises for wrong words on the command line; its own home moved between typer's releases."""

File = Annotated[
    list[str] | None,
    typer.Argument(metavar="[EXPERIMENT.yaml] [KEY.PATH=VALUE]...", help="Experiment file, and options over it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")]


@app.command()
def run(
    file: File = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run of this name.")] = False,
    resume_from: Annotated[int | None, typer.Option(help="Go on from this round (see keep_rounds).")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="local, centralised or none: what to compare with at the end.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
    on: Annotated[str, typer.Option(help="here: in this process; flower: on this server's clients.")] = "here",
    fold: Annotated[Path | None, typer.Option(help="The server's folder, with --on flower; default: fold.")] = None,
) -> None:
    """Run an experiment; without a file, the demo. Under torchrun, all processes share it."""
    if not group.is_main():
        from sheepfold.devices.worker import serve

        sys.exit(serve())
    experiment = _experiment(file, _baselines(baseline))
    from sheepfold.commands.places import runner

    go = runner(experiment, on, fold, resume, resume_from)
    if quiet or as_json:
        from sheepfold.clients import silent
        from sheepfold.display import json_lines

        _interruptible(lambda: go(json_lines if as_json else silent))
        return
    from sheepfold.display import Terminal

    with Terminal() as terminal:
        _interruptible(lambda: go(terminal))


@app.command()
def plan(
    file: File = None,
    with_steps: Annotated[
        bool, typer.Option("--calibrate", help="Load the base, time a few steps of the run, and say its seconds too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: clients, steps, bytes, memory. Without --calibrate it needs no weights and no GPU."""
    if not group.is_main():
        return  # the first one's to say
    experiment = _experiment(file)
    from sheepfold.calibration import calibrate, check
    from sheepfold.commands.plan import show
    from sheepfold.forecast import forecast

    if with_steps:
        check(experiment)
    foreseen = forecast(experiment)
    measured = calibrate(experiment, foreseen) if with_steps else None
    if as_json:
        _print(foreseen.as_dict() | ({"calibration": measured.as_dict()} if measured else {}))
    else:
        show(foreseen, measured)


@app.command()
def schema() -> None:
    """Print the JSON schema of the experiment file, for editors."""
    from sheepfold.config import json_schema

    _print(json_schema())


@data_app.command("split")
def data_split(
    out: Annotated[Path, typer.Argument(help="Folder for the per-client files.")],
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Write every client's rows into a file of its own, in Shepherd's layout."""
    experiment = _experiment(file)
    from sheepfold.data import split_files

    written = split_files.write(experiment.data, out)
    if as_json:
        _print({**asdict(written), "folder": str(written.folder)})
        return
    typer.echo(f"{written.rows:,} rows of {written.clients} clients in {written.files} files in {written.folder}")


@data_app.command("show")
def data_show(
    file: File = None,
    html: Annotated[Path | None, typer.Option(help="Also draw the table as a heat map into this HTML file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which client holds how many rows of which category."""
    experiment = _experiment(file)
    from sheepfold.data import prepare, table

    if html and not html.parent.is_dir():
        _fail(f"--html {html}: no folder {html.parent}; make it, or name another")
    parted = prepare.partition_only(experiment.data)
    counts = table.counts(parted)
    if html:
        from sheepfold import folders

        with folders.writing(html):
            folders.replace_file(html, table.heatmap_html(counts).encode())
    if as_json:
        _print(counts.as_dict())
        return
    from sheepfold.terminal import console

    console().print(table.terminal(counts))
    if len(parted.public):
        console().print(f"{len(parted.public):,} public rows are the server's, and no client's")


@data_app.command("doctor")
def data_doctor(file: File = None, as_json: AsJson = False) -> None:
    """Examine the data as training would see it: lengths, cut rows, missing answers, duplicates, leaks."""
    experiment = _experiment(file)
    from sheepfold.assembly import load_data
    from sheepfold.data import doctor
    from sheepfold.models import load_tokenizer
    from sheepfold.tasks import task

    tokenizer = load_tokenizer(experiment.model, task(experiment))
    report = doctor.examine(load_data(experiment, tokenizer), tokenizer)
    if as_json:
        _print(report.as_dict())
        return
    from sheepfold.terminal import console

    console().print(doctor.render(report))


COMMANDS: dict[str, Callable[..., None]] = {
    "eval": evaluate.command,
    "chat": chat.command,
    "serve": serve.command,
    "report": report.command,
    "track": track.command,
    "export": export.command,
    "finetune": finetune.command,
    "offsite": offsite.command,
    "certs": certs.command,
    "server": server.server,
    "client": client.command,
    "enroll": server.enroll,
    "status": server.status,
    "stop": server.stop,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Run the command line; our own errors become one line and exit code 2."""
    # Threads that spin long for each other crawl where cores are shared, and ones that sleep at once crawl everywhere.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        sys.exit(app(standalone_mode=False))
    except SheepfoldError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has seen enough
        sys.exit(141)
    except OSError as error:  # a place that the file system refuses: no such user, a name too long, no permission
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command shows its help
            error.show()
            sys.exit(2)
        where = error.ctx.command_path if error.ctx else "sheepfold"
        _fail(f"{error.format_message()} (see `{where} --help`)")


def _interruptible(go: Callable[[], object]) -> None:
    """Run; on Ctrl-C say how to go on. Rounds that were finished are on disk."""
    try:
        go()
    except KeyboardInterrupt:
        sys.stderr.write("sheepfold: interrupted; finished rounds are saved, go on with --resume\n")
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"sheepfold: {' '.join(message.split())}\n")
    sys.exit(2)


def _experiment(arguments: list[str] | None, more: list[str] | None = None) -> Any:
    from sheepfold.config import load

    words = arguments or []
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise typer.BadParameter(f"one experiment file at a time, found {', '.join(files)}")
    return load(files[0] if files else None, [w for w in words if "=" in w] + (more or []))


def _baselines(names: list[str] | None) -> list[str]:
    if not names:
        return []
    return [f"baselines=[{', '.join(n for n in names if n != 'none')}]"]


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
