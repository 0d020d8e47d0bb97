"""evaluation.tasks: the same benchmarks at the end of a run, found wanting before it trains."""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sheepfold import adapter_methods
from sheepfold.config import Experiment
from sheepfold.errors import SheepfoldError, TrainingError

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering
    from sheepfold.answering.source import Source
    from sheepfold.assembly import Parts
    from sheepfold.evaluation.benchmarks.results import Report
    from sheepfold.evaluation.benchmarks.settings import Settings
    from sheepfold.journal import RunFolder

FILE = "end-of-run.json"
ADAPTERS = ("base", "federated")
OPTIONS = {
    "tasks": "tasks",
    "data": "task_data",
    "fields": "task_fields",
    "shots": "task_shots",
    "limit": "task_limit",
    "new-tokens": "task_new_tokens",
    "template": "task_template",
    "allow-code": "allow_code",
}
"""An option of `sheepfold eval` -> the key of `evaluation` that says the same."""
_OPTION = re.compile(rf"(?<!sheepfold eval )--({'|'.join(OPTIONS)})\b")


def check(experiment: Experiment) -> None:
    """Raise ConfigError or DataError where the experiment's tasks cannot be asked, before anything trains.

    Reads the tasks' rows, and of the model its configuration alone.
    """
    if experiment.evaluation.tasks:
        from sheepfold.evaluation.benchmarks import catalogue

        with _as_the_file_says():
            settings = _settings(experiment)
            catalogue.check_all(settings, _positions(experiment))


def benchmarks(parts: "Parts", folder: "RunFolder", listener: Callable[[str, Mapping[str, Any]], None]) -> str | None:
    """Run the experiment's tasks on base and federated adapter, and write eval/end-of-run.json into the run's folder.

    What is there already of these adapters, asked the same way, is told and not asked again. Returns why they failed,
    None where they did not: training is done, and worth more than they are; the command that asks again is told. The
    engine's model is given up.
    """
    settings, path = _settings(parts.experiment), folder.path / "eval" / FILE
    try:
        report = _report(parts, folder, settings, listener)
        report.write(path)
    except SheepfoldError as error:
        listener("benchmarks_failed", {"why": str(error), "again": _command(folder, settings)})
        return str(error)
    listener("benchmarks", {"file": str(path), "figures": report.headline(), "notes": report.notes()})
    return None


def _report(
    parts: "Parts", folder: "RunFolder", settings: "Settings", listener: Callable[[str, Mapping[str, Any]], None]
) -> "Report":
    """Return what is in the run's folder, where it was asked the same way; else ask."""
    import torch

    from sheepfold.answering.source import find
    from sheepfold.evaluation.benchmarks import catalogue, evaluate, own_tasks, results

    source, asked = find(folder.path), catalogue.parse(settings)
    before = results.read(folder.path / "eval" / FILE)
    if before is not None and before.answers(settings, {name: source.adapter_hash(name) for name in ADAPTERS}):
        rows = [(before.data(task), own_tasks.data_facts(place, {})["sha256"]) for task, place in asked.own]
        if all(then == now for then, now in rows):
            return before

    def tell(text: str) -> None:
        listener("stage", {"text": f"benchmarks: {text}"})

    try:
        with _answering(parts, source) as answering:
            return evaluate.evaluate(answering, ADAPTERS, settings, asked, tell)
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"out of memory ({str(error).splitlines()[0]}); lower --batch-rows") from None


def _answering(parts: "Parts", source: "Source") -> "Answering":
    """Return the run's adapters on one base in memory: the one that it trained on, where that is as it was."""
    from sheepfold.answering.carriers import carrier
    from sheepfold.answering.model import Answering, open_source
    from sheepfold.engines.cohort import CohortEngine

    parts.engine.close()
    if parts.server is not None:
        parts.server.free()
    if parts.closed is not None:
        parts.closed.free()
    elif isinstance(parts.engine, CohortEngine):
        return Answering(source, parts.base, carrier(source, parts.base))
    # PEFT, hooks or training itself changed it: its memory is freed, and the base is read anew.
    parts.base.model.to("meta")
    return open_source(source, parts.experiment.device)


def _positions(experiment: Experiment) -> int | None:
    """Return the positions that a prompt and its answer may take; None where there is no end of them."""
    from sheepfold.models import config_only

    limit = config_only(experiment.model, experiment.device).max_positions
    virtual = adapter_methods.virtual_tokens(experiment.adapter.method, experiment.adapter.options)
    return None if limit is None else limit - virtual


@contextlib.contextmanager
def _as_the_file_says() -> Iterator[None]:
    """Let errors name the keys of the experiment file, where the parts that raise them know the command's options."""
    try:
        yield
    except SheepfoldError as error:
        text = _OPTION.sub(lambda option: f"evaluation.{OPTIONS[option[1]]}", str(error))
        raise type(error)(text) from None


def _command(folder: "RunFolder", settings: "Settings") -> str:
    """Return the command that asks the same, and writes where the run would have."""
    words = [
        "sheepfold",
        "eval",
        str(folder.path),
        "--tasks",
        ",".join(settings.tasks),
        "--adapter",
        ",".join(ADAPTERS),
    ]
    told = {
        "--data": settings.data,
        "--fields": ",".join(f"{field}={column}" for field, column in settings.fields.items()) or None,
        "--shots": settings.shots,
        "--limit": settings.limit,
        "--new-tokens": settings.new_tokens,
        "--batch-rows": settings.batch_rows,
        "--template": "run" if settings.template else None,
        "--out": folder.path / "eval" / FILE,
    }
    words += [word for name, value in told.items() if value is not None for word in (name, str(value))]
    return shlex.join([*words, *(["--allow-code"] if settings.allow_code else [])])


def _settings(experiment: Experiment) -> "Settings":
    from sheepfold.evaluation.benchmarks.settings import Settings

    asked = experiment.evaluation
    return Settings(
        tasks=asked.tasks,
        data=asked.task_data,
        fields=asked.task_fields,
        shots=asked.task_shots,
        limit=asked.task_limit,
        new_tokens=asked.task_new_tokens,
        batch_rows=asked.batch_rows,
        template=asked.task_template,
        allow_code=asked.allow_code,
    )
