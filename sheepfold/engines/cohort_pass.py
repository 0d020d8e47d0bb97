"""One pass of the cohort engine: K clients through one round's local training, together.

At each step the K clients' rows go through the base together; the loss of a client is the token mean over its own rows
of the step, and the losses are summed over clients, so no gradient sees another client. Each client's gradient is
clipped by its own norm, and one element-wise optimizer steps the stacked (K, numbers) tensor. Clients with fewer steps
leave early: the pass is sorted by steps, so the active ones are always the first k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sheepfold.engines.batches import Batch, Row, batches
from sheepfold.engines.clock import Clock
from sheepfold.engines.common import FIRST_LOSS_SCALE, Local
from sheepfold.engines.dropout import RowKeys
from sheepfold.engines.injection import Selection
from sheepfold.engines.owners import Owners, Packed, Rows, summed
from sheepfold.engines.packing import attention, packs
from sheepfold.engines.prefetch import ahead, depth
from sheepfold.engines.stack import Stack, chains, stacked
from sheepfold.errors import TrainingError
from sheepfold.local import optimizers
from sheepfold.local.rules import Factors, LocalRule
from sheepfold.local.steps import lr_factor, step_rows
from sheepfold.rng import derive

if TYPE_CHECKING:
    from sheepfold.engines.cohort import CohortEngine


@dataclass(slots=True)
class _Sums:
    """What one step's forward and backward passes left behind, besides the gradient."""

    loss: Tensor
    """(k,) float64: each client's mean loss of the step, without the local rule's penalty"""
    targets: np.ndarray
    """(k,) target tokens of the step"""
    rows: list[np.ndarray]


class Pass:
    """K clients through one round's local training, most steps first."""

    def __init__(self, engine: "CohortEngine", clients: Sequence[Local], rule: LocalRule | None) -> None:
        self.engine = engine
        self.everyone = self.clients = list(clients)
        self.rule = rule or LocalRule()
        self.clock = Clock(engine.device)
        first = clients[0].assignment
        for other in (c.assignment for c in clients):
            apart = other.side is not first.side and (other.side.pairs or first.side.pairs)
            if other.frozen != first.frozen or apart:
                raise TrainingError(
                    f"round {first.round + 1}: clients {first.client!r} and {other.client!r} freeze other kinds, or "
                    "have different sides; the cohort engine trains a pass alike: use train.engine peft_model"
                )
        self.side = chains(first.side, engine.device, engine.dtype)
        starts, whole = [c.start for c in clients], engine.cohort.whole
        self.stack = stacked(starts, engine.device, grad=True, frozen=first.frozen, whole=whole)
        self.packs = engine.packs and not starts[0].sparse  # a sparse change is as wide as its weight, client by client
        self.anchor = self._anchor() if self.rule.penalty else None
        self.correction = self._correction() if self.rule.correction else None
        self.gradients = torch.zeros_like(self.stack.flat) if self.rule.mean_gradient else None
        self.lr = max(c.assignment.lr for c in clients)
        self.optimizer = engine.build([self.stack.flat], self.lr)
        self.loss_scale = FIRST_LOSS_SCALE if engine.half else 1.0

    def run(self) -> None:
        """Train to the end, and write down what each client learned."""
        for step in range(self.clients[0].steps):
            self._leave(sum(c.steps > step for c in self.clients))
            self._step(step)
        self._leave(0)
        share = {stage: s / len(self.everyone) for stage, s in self.clock.seconds().items()}
        for client in self.everyone:
            client.seconds = share

    def _anchor(self) -> Stack:
        anchors = [c.anchor for c in self.clients]
        frozen = self.clients[0].assignment.frozen
        return stacked(anchors, self.engine.device, grad=False, frozen=frozen, whole=self.engine.cohort.whole)

    def _correction(self) -> Tensor:
        """Return (K, numbers): what the rule adds to every gradient."""
        assert self.rule.correction is not None
        return self.stack.packed([self.rule.correction(c.assignment, c.own) for c in self.clients])

    def _leave(self, active: int) -> None:
        """Take out the clients that have no step left, and go on with the first `active`."""
        if active == len(self.clients):
            return
        for k in range(active, len(self.clients)):
            client = self.clients[k]
            client.adapter = self.stack.adapter(k)
            if self.gradients is not None:
                self.gradients[k] /= max(1, client.good_steps)
                client.mean_gradient = self.stack.unpacked(self.gradients, k)
        self.clients = self.clients[:active]
        if not active:
            return
        smaller = self.stack.first(active)
        optimizer = self.engine.build([smaller.flat], self.lr)
        optimizers.narrowed(self.optimizer, self.stack.flat, optimizer, smaller.flat)
        self.stack, self.optimizer = smaller, optimizer
        self.anchor = self.anchor.first(active, grad=False) if self.anchor else None
        self.correction = None if self.correction is None else self.correction[:active]
        self.gradients = None if self.gradients is None else self.gradients[:active]

    def _step(self, step: int) -> None:
        sums, norms = self._gradients(step)
        # here, once a step, a GPU is waited for
        losses, sizes = torch.stack([sums.loss, norms.double()]).tolist()
        taken = [math.isfinite(loss) and math.isfinite(size) for loss, size in zip(losses, sizes, strict=True)]
        bad = None if all(taken) else ~torch.tensor(taken, device=self.engine.device)
        bound = self.engine.settings.grad_norm
        grad = self._grad()
        if bound is not None:
            grad.mul_((bound / (norms + 1e-6)).clamp(max=1.0)[:, None].to(grad.dtype))
        if self.gradients is not None:
            self.gradients.add_(grad if bad is None else grad.masked_fill(bad[:, None], 0))
        if self.correction is not None:
            grad.add_(self.correction)
        with optimizers.keeping(self.optimizer, [self.stack.flat], None if bad is None else [bad]):
            self._optimize(step)
        grad.zero_()
        for k, client in enumerate(self.clients):
            lengths = [self.engine.tokens.length(n) for n in sums.rows[k]]
            client.count(losses[k], int(sums.targets[k]), lengths, good=taken[k])
        self.engine.on_step(len(self.clients))
        self.clock.lap("step")

    def _gradients(self, step: int) -> tuple[_Sums, Tensor]:
        """Fill the flat gradient; return the step's sums and each client's gradient norm, (k,).

        In float16 the loss is scaled; where a finite loss gave a gradient that is not, the scale was too large, and the
        step is computed again with half of it. A client whose gradient overflows even unscaled has only itself to
        blame: it is left out, and the others go on with the scale they had.
        """
        first, hopeless = self.loss_scale, False
        while True:
            sums = self._forward_backward(step)
            grad = self._grad()
            if self.loss_scale != 1.0:
                grad.div_(self.loss_scale)
            norms = grad.square().sum(1).sqrt()
            overflow = torch.isfinite(sums.loss) & ~torch.isfinite(norms)
            if self.loss_scale == 1.0 < first and bool(overflow.any()):
                self.loss_scale, hopeless = first, True
            elif first == 1.0 or hopeless or not bool(overflow.any()):
                return sums, norms
            else:
                self.loss_scale /= 2
            grad.zero_()

    def _forward_backward(self, step: int) -> _Sums:
        engine = self.engine
        rows = [
            step_rows(
                engine.seed, c.assignment.client, c.rows, engine.settings.batch_rows, c.assignment.first_step + step
            )
            for c in self.clients
        ]
        targets = np.array([engine.targets[numbers].sum() for numbers in rows])
        flat = [Row(int(n), k, place) for k, numbers in enumerate(rows) for place, n in enumerate(numbers)]
        loss = torch.zeros(len(rows), dtype=torch.float64, device=engine.device)
        per_token = torch.from_numpy(1.0 / np.maximum(targets, 1)).to(engine.device, non_blocking=True)
        seeds = self._dropout_seeds(step)
        plan = engine.plan
        bounded = not self.packs or engine.settings.micro_rows is not None
        limits = {"max_rows": plan.micro_rows * len(rows) if bounded else len(flat), "max_tokens": plan.micro_tokens}
        if self.packs:
            made = packs(engine.tokens, flat, **limits)
        else:
            made = batches(engine.tokens, flat, **limits, collate=engine.task.collate)
        if engine.device.type == "cuda":
            made = (batch.pinned() for batch in made)
        for cpu_batch in ahead(made, depth(engine.device)):
            batch = cpu_batch.to(engine.device)
            self.clock.lap("data")
            with engine.cohort.using(self._selection(batch, seeds)), attention(engine.cohort.model, batch.pack):
                losses = engine.head.of(batch)
                weighted = losses * per_token[batch.target_group].to(losses.dtype)
                loss += summed(weighted.detach().double(), batch.target_group, len(rows))
                self.clock.lap("forward")
                if len(losses):  # a sum over clients keeps each gradient its own
                    torch.autograd.backward(weighted.sum() * self.loss_scale)
                self.clock.lap("backward")
        self._penalise()
        if not targets.all():
            loss[torch.from_numpy(targets == 0).to(loss.device)] = torch.nan  # a mean over nothing
        return _Sums(loss, targets, rows)

    def _dropout_seeds(self, step: int) -> Tensor | None:
        """Return (clients,) the address of each client's draws in this step; None where nothing is dropped."""
        if not self.engine.dropout:
            return None
        addresses = [("dropout", c.assignment.round, c.assignment.client, step) for c in self.clients]
        seeds = [derive(self.engine.seed, *address) for address in addresses]
        return torch.tensor(seeds).to(self.engine.device, non_blocking=True)

    def _selection(self, batch: Batch, seeds: Tensor | None) -> Selection:
        owners: Owners = Rows(batch.group)
        if batch.pack is not None:
            of = batch.pack.tokens_of
            owners = Packed(of + [0] * (len(self.clients) - len(of)), self.engine.device)
        selection = Selection(self.stack, batch.group, owners, side=self.side)
        if seeds is not None:
            selection.dropout = self.engine.dropout
            selection.keys = RowKeys(seeds[batch.group] + batch.place * 0x9E3779B9, batch.pack)
        return selection

    def _penalise(self) -> None:
        """Add the gradient of the local rule's penalty."""
        if self.rule.penalty is None or self.anchor is None:
            return
        factors = Factors(self.stack.trained, self.anchor.trained, self.stack.ranks())
        penalty = self.rule.penalty(factors).sum()
        if penalty.requires_grad:  # not where the rule looks at nothing that trains this round
            torch.autograd.backward(penalty * self.loss_scale)
        self.clock.lap("backward")

    def _optimize(self, step: int) -> None:
        """Step all clients, each at its own learning rate.

        The update of an element-wise optimizer is proportional to its rate, so where the rates differ (clients with
        unequal numbers of steps under a schedule) everybody steps at the highest one and is drawn back by the ratio.
        """
        settings = self.engine.settings
        rates = [c.assignment.lr * lr_factor(settings, step, c.steps) for c in self.clients]
        highest = max(rates)
        self.optimizer.param_groups[0]["lr"] = highest
        flat = self.stack.flat
        if min(rates) == highest:
            self.optimizer.step()
            return
        before = flat.clone()
        self.optimizer.step()
        ratio = torch.tensor([rate / highest for rate in rates], dtype=flat.dtype).to(flat.device, non_blocking=True)
        flat.copy_(torch.lerp(before, flat, ratio[:, None]))

    def _grad(self) -> Tensor:
        grad = self.stack.flat.grad
        assert grad is not None
        return grad
