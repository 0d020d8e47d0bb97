"""What can be asked: names in, the parts that run them out. Nothing here loads a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sheepfold.errors import ConfigError, require
from sheepfold.evaluation.benchmarks import code_tasks, suite
from sheepfold.evaluation.benchmarks.settings import Settings

if TYPE_CHECKING:
    from sheepfold.evaluation.benchmarks.harness import Tasks

OWN = {
    "exact_match": "own rows: the generated answer is the row's",
    "rouge_l": "own rows: the longest common subsequence of words",
    "perplexity": "own rows: nats per token of the answer, and perplexity",
    "choice": "own rows: the likeliest of each row's choices",
}


UNSPOKEN = ("perplexity", "choice")
"""Own tasks in which the model says nothing: its likelihoods are what counts."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The tasks of an evaluation, by who runs them."""

    harness: tuple[str, ...]
    code: tuple[str, ...]
    own: tuple[tuple[str, Path], ...]
    """(task, file of rows)"""

    @property
    def names(self) -> tuple[str, ...]:
        """Every task's name."""
        return (*self.harness, *self.code, *(task for task, _ in self.own))

    @property
    def own_answers(self) -> bool:
        """Whether a task of own rows has the model give answers."""
        return not {task for task, _ in self.own} <= set(UNSPOKEN)


def listing() -> dict[str, str]:
    """Return the tasks that we know by heart, with a line about each."""
    return suite.ABOUT | OWN


def parse(settings: Settings) -> Asked:
    """Return the tasks that the settings name; raises ConfigError for what cannot be meant. Looks nothing up."""
    harness: list[str] = []
    code: list[str] = []
    own: list[tuple[str, Path]] = []
    for told in dict.fromkeys(settings.tasks):
        name, colon, place = told.partition(":")
        if name in OWN:
            if not place and not settings.data:
                raise ConfigError(f"{name} is about rows of your own: say which with --data FILE or {name}:FILE")
            own.append((name, Path(place or str(settings.data)).expanduser()))
        elif colon:
            raise ConfigError(f"task {told!r}: only {', '.join(OWN)} take a file of rows")
        elif name in code_tasks.NAMES:
            code.append(name)
        else:
            harness += suite.TRUTHFULQA if name == "truthfulqa" else [name]
    return Asked(tuple(dict.fromkeys(harness)), tuple(code), tuple(own))


def check(settings: Settings) -> Asked:
    """Return the tasks that the settings name, once everything is there that they need but the model.

    Raises ConfigError for unknown names, options without effect and a missing library, DataError for missing rows.
    """
    asked = parse(settings)
    if asked.harness or asked.code:
        require(", ".join([*asked.harness, *asked.code]), "eval", "lm-eval")
    _check_options(settings, asked)
    for name in asked.code:
        code_tasks.check(name, settings)
    if asked.harness:
        from sheepfold.evaluation.benchmarks import harness

        harness.check(asked.harness, settings.data)
    if asked.own:
        from sheepfold.evaluation.benchmarks import own_tasks

        for task, place in asked.own:
            own_tasks.check(task, place, settings.fields)
    return asked


def check_all(settings: Settings, positions: int | None) -> None:
    """Check as `check` does, and read the tasks' rows too: nothing is left to be found but with the model.

    positions: what a prompt and its answer may take; None: no end. Raises ConfigError and DataError.
    """
    asked = check(settings)
    if settings.template:
        check_template(asked)
    if asked.harness or asked.code:
        load(asked, settings)
    settings.check_positions(positions)


def check_template(asked: Asked) -> None:
    """Raise ConfigError where the run's template would be asked for, and is used anyway."""
    if not (asked.harness or asked.code):
        raise ConfigError(f"--template has no effect on {', '.join(asked.names)}: own tasks always use the run's")


def load(asked: Asked, settings: Settings) -> "tuple[Tasks, list[str]]":
    """Return the tasks of the harness and of programs with their rows, and a line about each that is left out.

    Raises DataError for rows that cannot be had, ConfigError for options that none of the tasks takes.
    """
    from sheepfold.evaluation.benchmarks import harness

    programs, skipped = code_tasks.tasks(asked.code, settings)
    if asked.code and not programs:
        raise ConfigError(f"{', '.join(asked.code)}: {'; '.join(skipped)}")
    tasks = harness.load(asked.harness, settings, programs)
    spoken = asked.own_answers or any(task.OUTPUT_TYPE == "generate_until" for task in tasks.tasks.values())
    if settings.new_tokens is not None and not spoken:
        raise ConfigError(f"--new-tokens has no effect on {', '.join(asked.names)}: likelihoods are compared there")
    return tasks, skipped


def _check_options(settings: Settings, asked: Asked) -> None:
    """Raise ConfigError for options that none of the tasks takes."""
    spoken = asked.own_answers or asked.code
    idle: Sequence[tuple[str, bool, str]] = (
        ("--fields", bool(settings.fields) and not asked.own, ", ".join(OWN)),
        ("--data", bool(settings.data) and not _reads_data(settings), "tasks that name no file themselves"),
        ("--shots", settings.shots is not None and not asked.harness, "benchmarks that are asked with examples"),
        ("--samples", settings.samples > 1 and not asked.code, ", ".join(code_tasks.NAMES)),
        ("--allow-code", settings.allow_code and not asked.code, ", ".join(code_tasks.NAMES)),
        (
            "--temperature",
            settings.temperature > 0 and not spoken,
            f"{', '.join(code_tasks.NAMES)}, exact_match and rouge_l",
        ),
        (
            "--new-tokens",
            settings.new_tokens is not None and not (spoken or asked.harness),
            "tasks whose answers are generated",
        ),
    )
    for option, useless, who in idle:
        if useless:
            raise ConfigError(f"{option} has no effect on {', '.join(asked.names)}: it is for {who}")


def _reads_data(settings: Settings) -> bool:
    return any(":" not in told for told in settings.tasks)
