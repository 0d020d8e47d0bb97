"""How good given labels are, from how often each was given for each: a confusion matrix, whose counts merge.

Accuracy, Matthews correlation and F1 of everybody's rows come from the sum of the clients' matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sheepfold.errors import ConfigError, missing_extra, suggest

Confusion = np.ndarray
"""(labels, labels) int64: rows whose label is the first, and that were given the second"""


def accuracy(counts: Confusion) -> float:
    """Return the share of rows that were given their own label; nan where there are none."""
    total = counts.sum()
    return float(np.trace(counts) / total) if total else float("nan")


def matthews(counts: Confusion) -> float:
    """Return Matthews correlation, -1 to 1, as scikit-learn has it: 0 where only one label occurs, or is given."""
    true, given = np.indices(counts.shape).reshape(2, -1)
    return float(_sklearn().matthews_corrcoef(true, given, sample_weight=counts.reshape(-1)))


def f1(counts: Confusion) -> float:
    """Return the F1 score of the last of two labels (GLUE's equivalent, duplicate); of more, the mean over labels."""
    true, given = np.indices(counts.shape).reshape(2, -1)
    kind = {"average": "binary", "pos_label": 1} if len(counts) == 2 else {"average": "macro"}
    return float(_sklearn().f1_score(true, given, sample_weight=counts.reshape(-1), zero_division=0.0, **kind))


MEASURES: Mapping[str, Callable[[Confusion], float]] = {"accuracy": accuracy, "matthews": matthews, "f1": f1}


def check(names: Sequence[str]) -> None:
    """Raise ConfigError for a measure that does not exist, or whose library is missing."""
    for name in names:
        if name not in MEASURES:
            raise ConfigError(f"evaluation.metrics: no {name!r} with task classification; {suggest(name, MEASURES)}")
        if name != "accuracy":
            _sklearn()


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise missing_extra("evaluation.metrics matthews and f1", "scikit-learn", "classification") from None
    return metrics
