"""What both engines count and answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sheepfold.adapter import Adapter
from sheepfold.config import TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.local import optimizers
from sheepfold.local.rules import LocalRule
from sheepfold.local.steps import steps_in_round
from sheepfold.messages import Absence, Assignment, Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.state import BatchPlan

FIRST_LOSS_SCALE = 2.0**12
"""Where float16 loss scaling starts in each round; it halves until gradients are finite."""

Work = Sequence[tuple[int, np.ndarray]]
"""What to evaluate: (number of the adapter, row numbers)."""


class LocalEngine:
    """What both engines are made of: the clients' rows, and how one client trains."""

    def __init__(
        self,
        tokens: TokenRows,
        train_rows: Mapping[str, np.ndarray],
        train: TrainSettings,
        *,
        elementwise: bool,
        seed: int,
        plan: BatchPlan,
        rule: LocalRule | None,
    ) -> None:
        """train_rows: {client: row numbers}. Raises ConfigError for the optimizer."""
        self.tokens = tokens
        self.targets = tokens.target_tokens()
        self.train_rows = train_rows
        self.settings = train
        self.seed = seed
        self.plan = plan
        self.rule = rule
        self.on_step: Callable[[int], None] = lambda steps: None  # told how many client steps were taken
        self.build = optimizers.build(train, elementwise=elementwise)

    def local(self, assignment: Assignment) -> "Local":
        """Return a client ready to train; one without rows has no steps."""
        rows = np.asarray(self.train_rows[assignment.client])
        steps = steps_in_round(self.settings, len(rows)) if len(rows) else 0
        return Local(assignment, rows, int(self.targets[rows].sum()), steps)


@dataclass(slots=True)
class Local:
    """One client while it trains: its assignment, its rows, and what it has done so far."""

    assignment: Assignment
    rows: np.ndarray
    target_tokens: int
    """Target tokens of all its rows."""
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

    def answer(self, adapter: Adapter, seconds: Mapping[str, float]) -> Update | Absence:
        """Return the client's update, or, without a single good step, why there is none."""
        client = self.assignment.client
        if not self.good_steps:
            return Absence(client, f"no good step in {self.steps}: {self.why_skipped}", self.steps)
        if not adapter.is_finite():
            return Absence(client, "its adapter is no longer finite (overflow: lower the learning rate)", self.steps)
        measured = Measurements(
            loss=self.loss,
            rows=len(self.rows),
            target_tokens=self.target_tokens,
            processed_rows=self.processed_rows,
            processed_tokens=self.processed_tokens,
            steps=self.steps,
            skipped_steps=self.steps - self.good_steps,
            why_skipped=self.why_skipped,
            seconds=seconds,
        )
        return Update(client, adapter, measured)


def without_rows(assignment: Assignment) -> Absence:
    """Return the answer of a client that has nothing to train on."""
    return Absence(assignment.client, "it holds no training rows")


def explain(loss: float, targets: int) -> str:
    """Return why a step was not taken: what its loss was, and what that usually means."""
    if targets == 0:
        return "no label in any row of the step (every answer was cut away)"
    if np.isfinite(loss):
        return "the loss was finite but its gradient was not (overflow: lower the learning rate or use float32)"
    return f"the loss was {loss} (overflow: lower the learning rate, or use bfloat16 or float32)"
