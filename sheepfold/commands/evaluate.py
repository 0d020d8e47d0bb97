"""`sheepfold eval`: benchmarks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sheepfold.commands.options import AdapterConfig, BaseName, Bits, Device, Place
from sheepfold.errors import ConfigError

if TYPE_CHECKING:
    from sheepfold.answering.source import Source
    from sheepfold.evaluation.benchmarks.catalogue import Asked
    from sheepfold.evaluation.benchmarks.results import Report
    from sheepfold.evaluation.benchmarks.settings import Settings

LIST = "list"


def command(
    place: Place = None,
    tasks: Annotated[
        str, typer.Option(help="Names with commas between, such as gsm8k,mmlu; list: what there is.")
    ] = "",
    adapter: Annotated[
        str | None,
        typer.Option(help="federated, best, client:NAME, base; with commas, side by side; default: the run's own."),
    ] = None,
    base: BaseName = None,
    adapter_config: AdapterConfig = None,
    template: Annotated[
        str | None,
        typer.Option(help="Wrap benchmarks' prompts in the run's template (run) or another; default: plain prompts."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with the benchmarks' files, or a file of own rows; default: the hub.")
    ] = None,
    fields: Annotated[str, typer.Option(help="Own rows: field=column,..., such as output=answer.")] = "",
    shots: Annotated[int | None, typer.Option(help="Examples before each question; default: the benchmark's.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many rows of each task.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: the benchmark's.")] = None,
    samples: Annotated[int, typer.Option(help="HumanEval: programs for each problem.")] = 1,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    batch_rows: Annotated[int, typer.Option(help="Rows at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of examples and samples; default: the harness's own.")] = 1234,
    device: Device = "auto",
    bits: Bits = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Agree to run programs that the model wrote.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Results file; default: eval/ in the run's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False,
) -> None:
    """Judge a run, an adapter or a base by benchmarks, or by rows of your own."""
    if tasks == LIST:
        _list(as_json)
        return
    from sheepfold.evaluation.benchmarks.settings import Settings

    settings = Settings(
        tasks=tuple(task.strip() for task in tasks.split(",") if task.strip()),
        data=data,
        fields=_fields(fields),
        shots=shots,
        limit=limit,
        new_tokens=new_tokens,
        samples=samples,
        temperature=temperature,
        batch_rows=batch_rows,
        seed=seed,
        template=template is not None,
        allow_code=allow_code,
    )
    from sheepfold.answering.source import find
    from sheepfold.evaluation.benchmarks import catalogue, results

    own_template = None if template == "run" else template
    source = find(place, base=base, adapter_config=adapter_config, template=own_template)
    names = [source.check(name.strip()) for name in (adapter or source.default).split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--adapter {adapter!r}: names none; there are {', '.join(source.names)}")
    path = out or _place(source, settings, names)
    if path is not None:
        results.check_place(path)
    asked = catalogue.check(settings)
    if template == "run":
        catalogue.check_template(asked)
    report = _evaluated(source, names, settings, asked, device, bits, quiet=as_json)
    if path is not None:
        report.write(path)
    _show(report, path, as_json)


def _evaluated(
    source: "Source", names: list[str], settings: "Settings", asked: "Asked", device: str, bits: int | None, quiet: bool
) -> "Report":
    from sheepfold.answering.model import open_source
    from sheepfold.evaluation.benchmarks.evaluate import evaluate
    from sheepfold.terminal import console

    screen = console()
    with open_source(source, device, bits) as answering:
        if quiet or not screen.is_terminal:
            return evaluate(answering, names, settings, asked)
        with screen.status("") as status:
            return evaluate(answering, names, settings, asked, status.update)


def _place(source: "Source", settings: "Settings", names: list[str]) -> Path | None:
    """Return where a run's results go by default: a new file under the names of tasks and adapters."""
    from sheepfold.evaluation.benchmarks.results import new_file

    if source.run is None:
        return None
    return new_file(source.run.path / "eval", [*settings.tasks, *names])


def _fields(told: str) -> dict[str, str]:
    made = {}
    for part in filter(None, (part.strip() for part in told.split(","))):
        name, sign, column = part.partition("=")
        if not sign or not name:
            raise ConfigError(
                f"--fields {told!r}: expected field=column,..., such as instruction=question,output=answer"
            )
        made[name] = column
    return made


def _list(as_json: bool) -> None:
    from sheepfold.evaluation.benchmarks.catalogue import listing

    if as_json:
        typer.echo(json.dumps(listing(), indent=2))
        return
    for name, about in listing().items():
        typer.echo(f"{name:<12} {about}")
    typer.echo("\nAny other task of lm-evaluation-harness goes by its own name there, with rows from the hub.")


def _show(report: "Report", path: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    from rich.markup import escape

    from sheepfold.terminal import console

    screen = console()
    screen.print(report.table())
    for note in report.notes():
        screen.print(f"[yellow]note[/] {escape(note)}")
    if path is not None:
        screen.print(f"results are in [bold]{escape(str(path))}[/]")
