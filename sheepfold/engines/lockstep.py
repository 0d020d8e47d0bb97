"""One client trained by all processes together: each does what the first one does, at the same time.

    first     train_pass(clients) ──▶ told to all ──▶ trains   ┐ each step's rows, gradients and weights
    others    serve() ◀────────────── hear it ──────▶ train it ┘ are shared inside (sharding.py, deepspeed.py)

What clients keep, evaluation and the loop are the first process's alone; the others need only what training and
scoring take, which travels with each order: where clients start, which rows, what they keep.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import GenerationSettings
from sheepfold.devices import group
from sheepfold.engines.common import Local, Work
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.local.rules import LocalRule
from sheepfold.local.steps import steps_in_round
from sheepfold.metrics import Score
from sheepfold.state import BatchPlan

T = TypeVar("T")
END = "end"


class Orders(Protocol):
    """How what the first process says gets to all."""

    def tell(self, value: Any) -> None:
        """Say a value to all others (the first process)."""

    def hear(self) -> Any:
        """Return what the first process says next (all others)."""


class Broadcast:
    """Orders as bytes over a gloo group of their own: whatever the model's numbers travel by, these lie on the CPU."""

    def __init__(self) -> None:
        """Make the group; all processes do so at the same time."""
        import torch.distributed as dist

        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=group.WAIT_TIMEOUT_S))

    def tell(self, value: Any) -> None:
        """See Orders."""
        import torch.distributed as dist

        from sheepfold.devices.values import to_bytes

        data = to_bytes(value)
        for part in (torch.tensor([len(data)]), data):
            dist.broadcast(part, 0, group=self._group)

    def hear(self) -> Any:
        """See Orders."""
        import torch.distributed as dist

        from sheepfold.devices.values import from_bytes

        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return from_bytes(data)


class LockstepEngine(PeftModelEngine):
    """An engine of which every process has one; the first one's is the run's, the others' `serve` it."""

    def __init__(self, *of: Any, orders: Orders | None = None, **client: Any) -> None:
        """Make one process's engine, in all processes at the same time; see PeftModelEngine."""
        super().__init__(*of, **client)
        self._orders = orders or Broadcast()
        self._open = True

    def _tell(self, order: str, *asked: Any) -> None:
        """Have all others do what this process is about to do."""
        if group.is_main():
            self._orders.tell((order, asked))

    def _in_memory(self, work: Callable[[], T], less: Callable[[], tuple[BatchPlan, str] | None]) -> T:
        """Return what work comes to: nothing is done anew, since the others could not know of it."""
        return work()

    def train_pass(self, clients: Sequence[Local], rule: LocalRule | None) -> None:
        """Take these clients through their round, one after the other, in all processes."""
        named = "none" if rule is None else "own" if rule is self.rule else "near"
        told = [(c.assignment, c.start, c.anchor, c.own, c.rows) for c in clients]
        self._tell("train", told, named, self.settings, self.plan)
        super().train_pass(clients, rule)

    def _scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """See PeftModelEngine; every process goes through all rows, since none has the whole model."""
        self._tell("score", list(adapters), list(work), rows)
        return super()._scores(adapters, work, rows)

    def generate(
        self, adapters: Sequence[Adapter], work: Work, settings: GenerationSettings, pad_id: int, eos: Sequence[int]
    ) -> list[list[list[int]]]:
        """See PeftModelEngine; as with scores."""
        self._tell("generate", list(adapters), list(work), settings, pad_id, list(eos))
        return super().generate(adapters, work, settings, pad_id, eos)

    def close(self) -> None:
        """Let the others stop serving."""
        if self._open:
            self._open = False
            self._tell(END)

    def serve(self) -> None:
        """Do what the first process does, until it closes its engine."""
        doing: Mapping[str, Callable[..., object]] = {
            "train": self._train_told, "score": self._scores, "generate": self.generate,
        }  # fmt: skip
        while True:
            order, asked = self._orders.hear()
            if order == END:
                return
            doing[order](*asked)

    def _train_told(self, told: Sequence[Any], rule: str, settings: Any, plan: BatchPlan) -> None:
        self.settings, self.plan = settings, plan
        clients = []
        for a, start, anchor, own, rows in told:
            steps = steps_in_round(settings, len(rows))
            clients.append(Local(a, start, anchor, own, np.asarray(rows), int(self.targets[rows].sum()), steps))
        self.train_pass(clients, {"none": None, "own": self.rule, "near": self.near}[rule])
