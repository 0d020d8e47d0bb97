"""What both engines count and answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sheepfold.adapter import Adapter
from sheepfold.messages import Absence, Assignment, Measurements, Update
from sheepfold.metrics import Mean

FIRST_LOSS_SCALE = 2.0**12
"""Where float16 loss scaling starts in each round; it halves until gradients are finite."""

Work = Sequence[tuple[int, np.ndarray]]
"""What to evaluate: (number of the adapter, row numbers)."""


@dataclass(slots=True)
class Local:
    """One client while it trains: its assignment, its rows, and what it has done so far."""

    assignment: Assignment
    rows: np.ndarray
    steps: int
    """Steps this round."""
    loss: Mean = field(default_factory=Mean)
    good_steps: int = 0
    processed_rows: int = 0
    processed_tokens: int = 0
    why_skipped: str = ""

    def count(self, loss: float, targets: int, lengths: Sequence[int], *, good: bool) -> None:
        """Count one step: its loss (nats per target token), its target tokens, the lengths of its rows."""
        if not good:
            self.why_skipped = explain(loss, targets)
            return
        self.good_steps += 1
        self.loss += Mean(loss * targets, targets)
        self.processed_rows += len(lengths)
        self.processed_tokens += sum(lengths)

    def answer(self, adapter: Adapter, target_tokens: int, seconds: Mapping[str, float]) -> Update | Absence:
        """Return the client's update, or, without a single good step, why there is none."""
        client = self.assignment.client
        if not self.good_steps:
            return Absence(client, f"no good step in {self.steps}: {self.why_skipped}", self.steps)
        if not adapter.is_finite():
            return Absence(client, "its adapter is no longer finite (overflow: lower the learning rate)", self.steps)
        measured = Measurements(
            loss=self.loss,
            rows=len(self.rows),
            target_tokens=target_tokens,
            processed_rows=self.processed_rows,
            processed_tokens=self.processed_tokens,
            steps=self.steps,
            skipped_steps=self.steps - self.good_steps,
            why_skipped=self.why_skipped,
            seconds=seconds,
        )
        return Update(client, adapter, measured)


def explain(loss: float, targets: int) -> str:
    """Return why a step was not taken: what its loss was, and what that usually means."""
    if targets == 0:
        return "no label in any row of the step (every answer was cut away)"
    if np.isfinite(loss):
        return "the loss was finite but its gradient was not (overflow: lower the learning rate or use float32)"
    return f"the loss was {loss} (overflow: lower the learning rate, or use bfloat16 or float32)"
