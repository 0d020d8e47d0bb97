"""An evaluation from its settings to its report: every task, under every adapter asked for, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sheepfold.answering.model import Answering
from sheepfold.data.turns import Template
from sheepfold.evaluation.benchmarks import catalogue, own_tasks
from sheepfold.evaluation.benchmarks.catalogue import Asked
from sheepfold.evaluation.benchmarks.results import Report, TaskResult, versions
from sheepfold.evaluation.benchmarks.settings import Settings

Listener = Callable[[str], None]
"""Is told what is being done, in a few words."""


def evaluate(
    answering: Answering, names: Sequence[str], settings: Settings, asked: Asked, tell: Listener = lambda text: None
) -> Report:
    """Return what the tasks came to under each of the adapters `names`; asked: what catalogue.check made of them.

    Raises DataError for rows that cannot be had and ConfigError for options that do not go together.
    """
    adapters = {name: answering.source.adapter_hash(name) for name in map(answering.check, dict.fromkeys(names))}
    results: dict[str, dict[str, TaskResult]] = {name: {} for name in adapters}
    if asked.harness or asked.code:
        _harness(answering, results, settings, asked, tell)
    for task, place in asked.own:
        for name in adapters:
            tell(f"{task}: {name}")
            results[name][task] = own_tasks.run(task, place, answering, name, settings)
    return Report(asked.names, adapters, results, _facts(answering, settings))


def _harness(
    answering: Answering, results: dict[str, dict[str, TaskResult]], settings: Settings, asked: Asked, tell: Listener
) -> None:
    """Fill in the results of the harness's tasks and of programs."""
    from sheepfold.evaluation.benchmarks import harness

    tell(f"reading {', '.join([*asked.harness, *asked.code])}")
    tasks, skipped = catalogue.load(asked, settings)
    template: Template | None = answering.template if settings.template else None
    for name, found in results.items():
        tell(f"{', '.join([*asked.harness, *asked.code])}: {name}")
        with answering.using([name]) as model:
            made = harness.evaluate(tasks, model, answering.base.tokenizer, template, settings)
        if skipped:
            first = next(task for task in made if task.startswith("humaneval"))
            made[first] = replace(made[first], facts={**made[first].facts, "notes": skipped})
        found |= made


def _facts(answering: Answering, settings: Settings) -> dict[str, Any]:
    """Return what the figures depend on beside tasks and adapters."""
    source, base = answering.source, answering.base
    run: Mapping[str, Any] | None = {"name": source.name, "rounds": source.rounds} if source.run else None
    return {
        "model": {
            "base": base.name,
            "revision": source.model.revision,
            "fingerprint": base.fingerprint,
            "bits": answering.bits,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": base.device.type,
            "positions": answering.max_positions,
        },
        "run": run,
        "template": {"name": answering.template.name, "benchmarks_too": settings.template},
        "settings": settings.as_dict(),
        "versions": versions(),
    }
