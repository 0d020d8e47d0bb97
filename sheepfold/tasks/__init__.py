"""Tasks: what clients learn to do with a row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sheepfold.config import DataSettings, Experiment

if TYPE_CHECKING:
    from sheepfold.data.rows import Record
    from sheepfold.journal import RunFolder
    from sheepfold.tasks.base import Task


def task(experiment: Experiment, labels: tuple[str, ...] = ()) -> "Task":
    """Return the experiment's task; labels: those of its data, where they are known.

    Raises ConfigError for measures that the task does not have.
    """
    if experiment.task == "classification":
        from sheepfold.tasks import classification

        return classification.of(experiment, labels)
    from sheepfold.tasks.causal_lm import CAUSAL_LM

    return CAUSAL_LM


def task_of(run: "RunFolder") -> "Task":
    """Return the task of a run, with the labels that its data had."""
    return task(run.experiment(), tuple(run.data().get("labels", ())))


def with_labels(task: "Task | None", data: DataSettings, records: "Sequence[Record]") -> "Task":
    """Return the task (None: causal_lm) with the data's labels, where it has labels at all."""
    from sheepfold.tasks.causal_lm import CAUSAL_LM

    if task is None or task.name == CAUSAL_LM.name:
        return CAUSAL_LM
    from sheepfold.tasks.classification import Classification, labels_of

    assert isinstance(task, Classification)
    return replace(task, labels=labels_of(data, records))
