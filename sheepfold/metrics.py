"""Measurements that merge: a sum and a count, divided at the end.

`Mean + Mean` is a Mean, so a score does not depend on how rows were split over batches, clients or processes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Mean:
    """A running mean: `total` in the unit of the thing measured, `count` in what it is divided by (tokens, rows)."""

    total: float = 0.0
    count: float = 0.0

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """total / count; nan where nothing was counted."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Score:
    """What some rows came to."""

    loss: Mean = Mean()
    confusion: np.ndarray | None = None
    """(labels, labels) int64, where targets are labels: how often each was given for each"""

    def __add__(self, other: "Score") -> "Score":
        tables = [table for table in (self.confusion, other.confusion) if table is not None]
        return Score(self.loss + other.loss, sum(tables[1:], start=tables[0]) if tables else None)


def merge(means: Iterable[Mean]) -> Mean:
    """Return the mean over everything that the parts measured."""
    total = Mean()
    for mean in means:
        total = total + mean
    return total


def perplexity(loss: Mean) -> float:
    """Return exp of a mean loss in nats per token; inf where exp overflows."""
    try:
        return math.exp(loss.value)
    except OverflowError:
        return math.inf
