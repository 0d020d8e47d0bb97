"""GLUE's classification tasks: where each keeps its sentences, and what its labels are called.

One table for the hub's copy (nyu-mll/glue, labels as numbers), the original TSV files, and folders in GLUE's layout
(train.tsv, dev.tsv, test.tsv). Source: GLUE, arXiv:1804.07461.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sheepfold.data.records import Columns
from sheepfold.data.rows import Record
from sheepfold.errors import DataError

HUB = "nyu-mll/glue"
UNLABELLED = ("-1", "-")
"""What stands where a label is not told: the hub's test splits, and MNLI's pairs that its annotators disagree about."""
REGRESSION = ("stsb", "sts-b")


@dataclass(frozen=True, slots=True)
class GlueTask:
    """One task of GLUE."""

    labels: tuple[str, ...]
    """The labels' names, by the hub's numbers"""
    first: tuple[str, ...] = ("sentence",)
    """Columns that may hold the sentence, or the first one of a pair"""
    second: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] = ()
    """The columns of its tables, where these have no header line"""
    measures: tuple[str, ...] = field(default_factory=tuple)
    """What GLUE scores it by, beside accuracy"""

    @property
    def columns(self) -> Columns:
        """Where each field is looked for."""
        return {"instruction": self.first, "input": self.second, "output": self.label}


GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        ("unacceptable", "acceptable"), header=("publication", "label", "mark", "sentence"), measures=("matthews",)
    ),
    "sst2": GlueTask(("negative", "positive")),
    "mrpc": GlueTask(
        ("not_equivalent", "equivalent"),
        ("sentence1", "#1 String"),
        ("sentence2", "#2 String"),
        ("label", "Quality"),
        measures=("f1",),
    ),
    "qqp": GlueTask(
        ("not_duplicate", "duplicate"), ("question1",), ("question2",), ("label", "is_duplicate"), measures=("f1",)
    ),
    "mnli": GlueTask(
        ("entailment", "neutral", "contradiction"),
        ("premise", "sentence1"),
        ("hypothesis", "sentence2"),
        ("label", "gold_label"),
    ),
    "qnli": GlueTask(("entailment", "not_entailment"), ("question",), ("sentence",)),
    "rte": GlueTask(("entailment", "not_entailment"), ("sentence1",), ("sentence2",)),
    "wnli": GlueTask(("not_entailment", "entailment"), ("sentence1",), ("sentence2",)),
}


def labelled(labels: Sequence[str]) -> Callable[[Record], Record | str]:
    """Return what a loader does to a record: its label by name, in `output` and, where it has none, as its category."""

    def tidy(record: Record) -> Record | str:
        told = record.output.strip()
        if told in UNLABELLED:
            return "without a label"
        name = labels[int(told)] if told.isdigit() and int(told) < len(labels) else told
        if name not in labels:
            numbers = ", ".join(f"{number} ({label})" for number, label in enumerate(labels))
            raise DataError(f"the label is {told!r}; expected {numbers}")
        return replace(record, output=name, category=record.category or name)

    return tidy
