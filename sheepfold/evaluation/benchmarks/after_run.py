"""evaluation.tasks: the same benchmarks at the end of a run, found wanting before it trains."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sheepfold.config import Experiment

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering
    from sheepfold.answering.source import Source
    from sheepfold.assembly import Parts
    from sheepfold.evaluation.benchmarks.settings import Settings
    from sheepfold.journal import RunFolder

FILE = "end-of-run.json"
ADAPTERS = ("base", "federated")


def check(experiment: Experiment) -> None:
    """Raise ConfigError or DataError where the experiment's tasks cannot be run, before anything trains."""
    if experiment.evaluation.tasks:
        from sheepfold.evaluation.benchmarks import catalogue

        catalogue.check(_settings(experiment))


def benchmarks(parts: "Parts", folder: "RunFolder", listener: Callable[[str, Mapping[str, Any]], None]) -> None:
    """Run the experiment's tasks on base and federated adapter, and write eval/end-of-run.json into the run's folder.

    The engine is closed: the base that it trained on is asked, not a second one.
    """
    if not parts.experiment.evaluation.tasks:
        return
    from sheepfold.answering.source import find
    from sheepfold.evaluation.benchmarks import catalogue
    from sheepfold.evaluation.benchmarks.evaluate import evaluate

    settings = _settings(parts.experiment)
    with _answering(parts, find(folder.path)) as answering:
        report = evaluate(
            answering,
            ADAPTERS,
            settings,
            catalogue.parse(settings),
            lambda text: listener("stage", {"text": f"benchmarks: {text}"}),
        )
    path = folder.path / "eval" / FILE
    report.write(path)
    listener("benchmarks", {"file": str(path), "figures": report.headline(), "notes": report.notes()})


def _answering(parts: "Parts", source: "Source") -> "Answering":
    from sheepfold.answering.carriers import carrier
    from sheepfold.answering.model import Answering, open_source
    from sheepfold.engines.cohort import CohortEngine

    if isinstance(parts.engine, CohortEngine):
        parts.engine.close()
        return Answering(source, parts.base, carrier(source, parts.base))
    return open_source(source, parts.experiment.device)  # PEFT keeps the base that it trained on


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
