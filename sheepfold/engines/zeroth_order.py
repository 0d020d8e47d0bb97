"""The engine of adapter.method seeds: all weights of the base train, without a gradient; seeds and scalars travel.

    a step:   g = (loss(w + eps z_s) - loss(w - eps z_s)) / (2 eps),   w <- w - lr g z_s

s is one of the run's candidate directions, drawn anew for every step; a client answers with every step's s and g. The
weights that it steps from are kept in float32 or wider beside the model, so putting a perturbation back loses nothing.

Sources: MeZO, arXiv:2305.17333, Algorithm 1; FedKSeed, arXiv:2312.06353, Algorithm 1.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepfold import adapter_methods
from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.engines.common import Local
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.engines.seed_carrier import SEEDS, SeedCarrier, number_type
from sheepfold.local.rules import LocalRule
from sheepfold.local.steps import step_rows
from sheepfold.messages import Absence, Update
from sheepfold.rng import stream

CANDIDATES, SCALARS = "candidates", "scalars"
"""What a message names the candidates, (n,) integers, and scalar gradients, (n,) float32, of the n steps taken."""


class ZerothOrderEngine(PeftModelEngine):
    """Trains all weights along candidate directions, one client after the other; evaluates as the peft_model engine."""

    def __init__(
        self,
        model: Any,
        tokens: TokenRows,
        train_rows: Mapping[str, np.ndarray],
        train: TrainSettings,
        adapter: AdapterSettings,
        *,
        seed: int,
        **client: Any,
    ) -> None:
        """Make an engine over clients' training rows, {client: row numbers}; `client`: see LocalEngine.

        The model is the engine's from here on. Raises ConfigError for the optimizer, ModelError for the model.
        """
        options = adapter_methods.seed_options(adapter.options)
        self.eps = options.eps
        self.weights = SeedCarrier(model, options.candidates, train.lr, seed)
        super().__init__(model, [], tokens, train_rows, train, adapter, seed=seed, carried=self.weights, **client)

    def train_pass(self, clients: Sequence[Local], rule: LocalRule | None) -> None:
        """Take these clients through their round, one after the other; no rule has a part in it."""
        for client in clients:
            self._walk(client)

    @torch.no_grad()
    def _walk(self, client: Local) -> None:
        seconds = {"forward": 0.0, "step": 0.0}
        began = time.perf_counter()
        weights = self.weights.weights(client.start).to(self.device, copy=True)
        candidates = self._candidates(client)
        scalars = torch.full((client.steps,), torch.nan)
        for step, s in enumerate(candidates.tolist()):
            scalars[step] = self._scalar(client, step, weights, s, seconds)
            if not scalars[step].isnan():
                self.weights.move(weights, s, -self.settings.lr * float(scalars[step]))
            self.on_step(1)
        client.adapter = _added(client.start, candidates, scalars)
        taken = ~scalars.isnan()
        client.send = {CANDIDATES: candidates[taken], SCALARS: scalars[taken]}
        seconds["step"] = time.perf_counter() - began - seconds["forward"]
        client.seconds = seconds

    def _candidates(self, client: Local) -> Tensor:
        """Return a candidate for each step: what the server drew, else uniform ones of the client's own."""
        a, known = client.assignment, len(self.weights.keys)
        dtype = number_type(known)
        own = stream(self.seed, "candidates", a.client, a.round).integers(known, size=client.steps)
        drawn = a.memory.get(CANDIDATES, torch.empty(0, dtype=dtype))
        return torch.cat([drawn, torch.from_numpy(own).to(dtype)[len(drawn) :]])[: client.steps]

    def _scalar(self, client: Local, step: int, weights: Tensor, s: int, seconds: dict[str, float]) -> float:
        """Return a step's scalar gradient, NaN where it cannot be taken, and count the step."""
        a, settings = client.assignment, self.settings
        rows = step_rows(self.seed, a.client, client.rows, settings.batch_rows, a.first_step + step)
        targets = int(self.targets[rows].sum())
        losses = []
        for side in (self.eps, -self.eps):
            self.weights.perturb(weights, s, side)
            began = time.perf_counter()
            losses.append(self._loss(rows) / targets if targets else float("nan"))
            seconds["forward"] += time.perf_counter() - began
        g = (losses[0] - losses[1]) / (2 * self.eps)
        good = abs(g) <= torch.finfo(torch.float32).max  # in which it travels
        if good and settings.grad_norm is not None:
            g = min(max(g, -settings.grad_norm), settings.grad_norm)
        client.count(sum(losses) / 2, targets, [self.tokens.length(n) for n in rows], good=good)
        return g if good else float("nan")

    def _loss(self, rows: np.ndarray) -> float:
        """Return the nats of all targets of a step, added up in float64."""
        total = 0.0
        for first in range(0, len(rows), self.plan.micro_rows):
            part = rows[first : first + self.plan.micro_rows]
            predicted = self.task.predict(self.weights.model, self.tokens, part, self.device)
            total += float(predicted.losses().double().sum())
        return total

    def _answer(self, client: Local) -> Update | Absence:
        """Return the steps' candidates and scalars; the adapter follows from them and what was handed out."""
        answer = super()._answer(client)
        if isinstance(answer, Absence):
            return answer
        unsent = frozenset(answer.adapter.tensors())
        return Update(answer.client, answer.adapter, answer.measurements, client.send, unsent)


def _added(start: Adapter, candidates: Tensor, scalars: Tensor) -> Adapter:
    """Return the adapter with a client's scalars added to its sums; steps not taken count nothing."""
    sums = start.extra[SEEDS].double().index_add(0, candidates.long(), scalars.nan_to_num(0.0).double())
    return Adapter(extra={SEEDS: sums.float()})
