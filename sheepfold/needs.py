"""What training takes of a device's memory, from the experiment, the base's shapes and the lengths of its rows.

    base + server's copies + clients of a pass x (numbers, gradients, moments, update) + activations of a forward pass

Activations are bounded by the plan's tokens a forward pass, whatever the number of clients; the rest grows with that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from sheepfold.activations import activation_bytes, rows_of_a_pass
from sheepfold.adapter import Adapter
from sheepfold.adapter_methods import SEEDS
from sheepfold.config import Experiment
from sheepfold.data.rows import TokenRows
from sheepfold.engines.recomputing import can_recompute
from sheepfold.local import optimizers
from sheepfold.local.rules import LocalRule
from sheepfold.memory import BYTES_PER_NUMBER
from sheepfold.models import Outline, pick_device
from sheepfold.state import BatchPlan
from sheepfold.tasks.base import Task

COPY_BYTES = 4
"""A number of an adapter that a client has done with, or that the server hands out: float32"""
FOLD_BYTES = 8
"""A number of the running sum in a fold: float64"""
HELD_BACK = 1.5
"""Resident bytes for each byte of activations on a CPU: malloc does not give all that is free back at once. Seen: 1.3
to 1.9 over 2 to 12 layers; with MALLOC_TRIM_THRESHOLD_ low it is 1.0, and a round takes 1.6 times as long."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a run's training takes on its device, in bytes."""

    base: int
    """The weights"""
    numbers: int
    """Numbers of one client's adapter"""
    activations: Callable[[int, int, bool], int | None]
    """(most tokens, most rows) of a forward pass, whether blocks run again in the backward one -> bytes at the peak of
    both; None: not known"""
    longest: int = 1
    """Tokens of the longest row"""
    number_bytes: int = BYTES_PER_NUMBER
    """What a number takes in training: itself, its gradient, the optimizer's moments, and what a local rule keeps"""
    vectors: int = 0
    """What an engine without gradients keeps beside the weights: two vectors as long, in float32"""
    weights_train: bool = False
    """Whether the base's own weights are what trains, one client at a time"""
    can_recompute: bool = False
    """Whether the base's blocks can run again in the backward pass"""

    @property
    def client(self) -> int:
        """What a client of a pass takes: its numbers in training, and the copy that becomes its update."""
        own = self.number_bytes - (COPY_BYTES if self.weights_train else 0)
        return (own + COPY_BYTES) * self.numbers

    @property
    def server(self) -> int:
        """What the server holds while a cohort trains: the global adapter, and the sum of the updates so far."""
        return (COPY_BYTES + FOLD_BYTES) * self.numbers

    def of(self, plan: BatchPlan) -> int:
        """Return what training by this plan takes at its peak, without libraries; activations as far as known."""
        clients = plan.clients_per_pass * self.client
        return self.base + self.vectors + self.server + clients + (self.in_a_pass(plan) or 0)

    def in_a_pass(self, plan: BatchPlan) -> int | None:
        """Return the activations of the plan's largest forward pass; None: not known."""
        return self.activations(plan.micro_tokens, plan.micro_rows * plan.clients_per_pass, plan.recompute)


def need_of(
    experiment: Experiment,
    outline: Outline,
    task: Task,
    tokens: TokenRows,
    sites: Sequence[str],
    adapter: Adapter,
    rule: LocalRule | None = None,
) -> Need:
    """Return what training takes.

    sites: the modules that LoRA adapts; adapter: the global one before round 1; rule: what clients do beside the loss.
    """
    train, method = experiment.train, experiment.adapter.method
    by_tokens = train.engine == "cohort"
    held = 1.0 if pick_device(experiment.device).type == "cuda" else HELD_BACK

    @cache  # asked again in every round, of the same plan
    def activations(most_tokens: int, most_rows: int, recompute: bool) -> int | None:
        if not len(tokens.lengths()) or train.sharding != "none":  # a process's share goes by how many there are
            return None
        longest = most_tokens if by_tokens else most_rows * int(tokens.lengths().max())
        rows = rows_of_a_pass(tokens, longest, most_rows)
        found = activation_bytes(
            outline.model, sites, adapter, experiment.adapter, train, task, tokens, rows,
            dtype=outline.dtype, together=by_tokens and most_rows > train.batch_rows, recompute=recompute,
        )  # fmt: skip
        if found is None:
            return None
        return round(held * found) + (_largest_weight(outline) if outline.quantised else 0)

    return Need(
        base=outline.bytes,
        vectors=8 * outline.parameters if method == SEEDS else 0,
        numbers=adapter.numbers_in_training,
        activations=activations,
        longest=int(tokens.lengths().max(initial=1)),
        number_bytes=COPY_BYTES * (2 + optimizers.moments(train) + _kept(rule)),
        weights_train=method == "full",
        can_recompute=can_recompute(outline.model, method),
    )


def _kept(rule: LocalRule | None) -> int:
    """Return how many tensors as large as the adapter a local rule keeps while a client trains."""
    if rule is None:
        return 0
    return (rule.penalty is not None) + (rule.correction is not None) + rule.mean_gradient


def _largest_weight(outline: Outline) -> int:
    """Return the bytes of the largest linear weight as it is computed with, whole again."""
    linear = (m.weight.numel() for m in outline.model.modules() if isinstance(m, nn.Linear))
    return max(linear, default=0) * outline.dtype.itemsize
