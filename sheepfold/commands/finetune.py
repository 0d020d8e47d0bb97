"""`sheepfold finetune`: one model, on rows in one place."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sheepfold.errors import ConfigError

INSTEAD = {
    "train.epochs": "give --epochs",
    "train.steps": "give --epochs",
    "train.schedule": "give --schedule",
    "adapter.method": "give --method",
}
"""Options of the file that an option of the command takes the place of."""
OF_A_RUN = (
    "name", "output", "federation", "personal", "offsite", "stop", "baselines", "keep_rounds", "trackers",
    "tracker_args", "train.engine", "train.round_schedule", "train.halve_after", "train.clients_per_pass",
    "train.local_rule", "train.local_rule_args", "evaluation.every", "evaluation.generation", "evaluation.tasks",
)  # fmt: skip
"""Options of the file that are about clients, rounds and what comes after them."""
OF_COHORT = ("train.packing", "train.compile")
OF_LORA = ("adapter.rank", "adapter.ranks", "adapter.alpha", "adapter.dropout", "adapter.targets", "adapter.options")


def command(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT.yaml", help="Experiment file: data, task, base.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Options over the file's.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="public: the rows of data.public; clients: all clients' training rows; all: both. Default: public "
            "where there are some, else clients."
        ),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of the rows that is public: data.public.share, with --on public.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 1,
    method: Annotated[
        str, typer.Option(help="full: all weights; lora: an adapter. Whatever the file's adapter.method is.")
    ] = "full",
    schedule: Annotated[
        str, typer.Option(help="linear, cosine or constant: the learning rate over all epochs, from train.lr on.")
    ] = "linear",
    as_json: Annotated[bool, typer.Option("--json", help="Print what finetune.json holds, and nothing else.")] = False,
) -> None:
    """Fine-tune a model centrally on a share of an experiment's rows: fedkd's teacher, or the centralised baseline."""
    words = _checked(experiment, out, options or [], method)
    if share is not None:
        if on not in (None, "public"):
            raise ConfigError(f"--share {share:g} has no effect with --on {on}; set data.public.share={share:g}")
        on = "public"
        words.append(f"data.public.share={share}")
    from sheepfold.config import load

    settings = load(experiment, words)
    try:
        from sheepfold.finetuning import Arguments, finetune, silent

        arguments = Arguments(on, epochs, method, schedule)
        if as_json:
            typer.echo(json.dumps(finetune(settings, out, arguments, silent).facts, indent=2))
            return
        with _Shown(epochs) as shown:
            made = finetune(settings, out, arguments, shown)
        typer.echo(made.folder)
    except KeyboardInterrupt:
        sys.stderr.write(f"sheepfold: interrupted; nothing was written to {out}\n")
        raise typer.Exit(130) from None


def _checked(experiment: str, out: Path, options: Iterable[str], method: str) -> list[str]:
    """Return the options over the file's; raise ConfigError for those that do nothing here."""
    if "=" in experiment or "=" in str(out):
        raise ConfigError(f"{experiment} {out}: expected EXPERIMENT.yaml OUT first, then key.path=value")
    idle = {**INSTEAD, **dict.fromkeys(OF_A_RUN, "there are no rounds and no clients")}
    idle |= dict.fromkeys(OF_COHORT, "it trains in engine peft_model")
    if method == "full":
        idle |= dict.fromkeys(OF_LORA, "all weights are trained; take --method lora")
    for word in options:
        key = word.partition("=")[0]
        for name, why in idle.items():
            if key == name or key.startswith(f"{name}."):
                raise ConfigError(f"{word}: has no effect on finetune; {why}")
    return list(options)


class _Shown:
    """Prints what is trained on what, and a line an epoch; a bar below them, where somebody looks."""

    def __init__(self, epochs: int) -> None:
        from rich.progress import Progress

        from sheepfold.terminal import console

        self._epochs, self._console = epochs, console()
        self._bar = Progress(console=self._console, transient=True, disable=not self._console.is_terminal)

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        getattr(self, f"_on_{event}")(facts)

    def _on_start(self, facts: Mapping[str, Any]) -> None:
        trained = "all weights" if facts["method"] == "full" else "LoRA"
        self._say(f"{facts['base']} ({facts['device']}, {facts['dtype']}): {trained}, {facts['numbers']:,} numbers")
        rows = "; ".join(f"{count:,} rows, {name}: {facts['rows_from'][name]}" for name, count in facts["rows"].items())
        self._say(f"trained on {rows}; {facts['steps']:,} steps")
        if held_out := facts["held_out_rows"]:
            self._say(f"measured on {held_out:,} rows: {facts['held_out_from']}")
        else:
            self._say("measured on nothing: no row is held out; set data.test_split or data.eval_share")
        for note in facts["notes"]:
            self._say(f"note: {note}")
        self._bar.add_task("training", total=facts["steps"])
        self._bar.start()

    def _on_step(self, facts: Mapping[str, Any]) -> None:
        self._bar.update(self._bar.task_ids[0], completed=facts["steps"])

    def _on_epoch(self, line: Mapping[str, Any]) -> None:
        number = line["epoch"]
        figures = {"train loss": line["train_loss"]} if number else {}
        figures |= {("held-out loss" if name == "loss" else name): v for name, v in line["held_out"].items()}
        if figures:
            said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            seconds = sum(line["seconds"].values())
            self._say(f"{f'epoch {number} of {self._epochs}' if number else 'before'}: {said} ({seconds:.1f} s)")
        if "skipped_steps" in line:
            self._say(f"note: {line['skipped_steps']:,} steps skipped: {line['why_skipped']}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
