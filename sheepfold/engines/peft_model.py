"""The reference engine: plain PEFT on a plain transformers model, one client at a time.

It trains any PEFT method, and all weights (`adapter.method: full`); the cohort engine is measured against it. The same
rows, steps, learning rates, clipping and loss as there, written the ordinary way.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepfold.adapter import Adapter, kind
from sheepfold.config import AdapterSettings, GenerationSettings, TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.engines.carriers import Carrier, PeftCarrier, SideHooks, carrier
from sheepfold.engines.common import FIRST_LOSS_SCALE, Local, LocalEngine, Work, score_of
from sheepfold.local import optimizers
from sheepfold.local.rules import Factors, LocalRule
from sheepfold.local.steps import lr_factor, step_rows
from sheepfold.metrics import Score
from sheepfold.rng import derive
from sheepfold.state import BatchPlan


class PeftModelEngine(LocalEngine):
    """Trains and evaluates any adapter through PEFT, one client after the other."""

    def __init__(
        self,
        model: Any,
        sites: Sequence[str],
        tokens: TokenRows,
        train_rows: Mapping[str, np.ndarray],
        train: TrainSettings,
        adapter: AdapterSettings,
        *,
        seed: int,
        plan: BatchPlan,
        beyond_peft: bool = False,
        only: Sequence[str] | None = None,
        carried: Carrier | None = None,
        **client: Any,
    ) -> None:
        """Make an engine over clients' training rows, {client: row numbers}; `sites` are the modules that LoRA adapts.

        beyond_peft: adapters may hold cores and sparse deltas, for which PEFT has no layers; only: the tensors that
        method full trains, where not all; carried: the model with what carries adapters in it, where a kind of engine
        has its own; `client`: see LocalEngine.
        The model is the engine's from here on. Raises ConfigError for the optimizer, the method or its options.
        """
        super().__init__(tokens, train_rows, train, elementwise=False, seed=seed, plan=plan, **client)
        first = next(model.parameters())
        self.device, self.half = first.device, first.dtype == torch.float16
        self.side = SideHooks(model, sites)
        if carried is None:
            carried = carrier(model, sites, adapter, seed, beyond_peft=beyond_peft, task=self.task, only=only)
        self.carrier = carried

    def initial(self) -> Adapter:
        """Return the adapter as PEFT initialises it, from this run's seed."""
        return self.carrier.read()

    def train_pass(self, clients: Sequence[Local], rule: LocalRule | None) -> None:
        """Take these clients through their round, one after the other."""
        for client in clients:
            self._train_one(client, rule or LocalRule())

    def _train_one(self, client: Local, rule: LocalRule) -> None:
        began = time.perf_counter()
        a = client.assignment
        anchor = self._values(client.anchor) if rule.penalty else {}
        self.carrier.write(client.start)
        self.side.put(a.side)
        params = self.carrier.factors()
        for name, p in params.items():
            p.requires_grad_(kind(name) not in a.frozen)
        params = {name: p for name, p in params.items() if p.requires_grad}
        job = _Job(client, params, rule, {name: anchor[name] for name in params if name in anchor})
        if rule.correction:
            job.correction = {n: t.to(params[n]) for n, t in rule.correction(a, client.own).items()}
        self.carrier.model.train()  # for the adapter's own dropout; the base's is silent
        optimizer = self.build(params.values(), a.lr)
        scale = FIRST_LOSS_SCALE if self.half else 1.0
        for step in range(client.steps):
            scale = self._step(job, step, optimizer, scale)
            self.on_step(1)
        self.carrier.model.eval()
        client.adapter = self.carrier.read()
        client.mean_gradient = {n: (g / max(1, client.good_steps)).cpu() for n, g in job.gradients.items()}
        # one figure: plain loops overlap nothing, and splitting it would need a synchronisation at every call
        client.seconds = {"train": time.perf_counter() - began}

    def _values(self, adapter: Adapter) -> dict[str, Tensor]:
        self.carrier.write(adapter)
        return {name: p.detach().clone() for name, p in self.carrier.factors().items()}

    def _step(self, job: "_Job", step: int, optimizer: torch.optim.Optimizer, scale: float) -> float:
        """Take one step; return the loss scale to go on with (float16)."""
        client, settings = job.client, self.settings
        a, params = client.assignment, list(job.params.values())
        rows = step_rows(self.seed, a.client, client.rows, settings.batch_rows, a.first_step + step)
        targets = int(self.targets[rows].sum())
        seed = derive(self.seed, "dropout", a.round, a.client, step)
        while True:
            loss = self._gradients(job, rows, targets, seed, scale)
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params if p.grad is not None]))
            if scale <= 1.0 or bool(torch.isfinite(norm)) or not np.isfinite(loss):
                break
            scale /= 2
        good = bool(np.isfinite(loss)) and bool(torch.isfinite(norm))
        if settings.grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, settings.grad_norm)
        job.correct(good=good)
        optimizer.param_groups[0]["lr"] = a.lr * lr_factor(settings, step, client.steps)
        whole = [torch.ones(p.shape[0] if p.dim() else (), dtype=torch.bool, device=p.device) for p in params]
        with optimizers.keeping(optimizer, params, None if good else whole):
            optimizer.step()
        client.count(loss, targets, [self.tokens.length(n) for n in rows], good=good)
        return scale

    def _gradients(self, job: "_Job", rows: np.ndarray, targets: int, seed: int, scale: float) -> float:
        """Fill the gradients of a step and return its loss: the token mean over all its rows."""
        for p in job.params.values():
            p.grad = torch.zeros_like(p)
        if not targets:
            return float("nan")
        total = 0.0
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for first in range(0, len(rows), self.plan.micro_rows):
                part = rows[first : first + self.plan.micro_rows]
                predicted = self.task.predict(self.carrier.model, self.tokens, part, self.device)
                nats = predicted.losses().sum() / targets
                torch.autograd.backward(nats * scale)
                total += float(nats.detach().double())
        if job.rule.penalty is not None and (penalty := job.rule.penalty(job.factors()).sum()).requires_grad:
            torch.autograd.backward(penalty * scale)
        for p in job.params.values():
            if scale != 1.0 and p.grad is not None:
                p.grad.div_(scale)
        return total

    def scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """Return what adapters[a] come to on the given rows, for each (a, row numbers) of the work."""
        found = [Score()] * len(work)
        for a, adapter in enumerate(adapters):
            with self._showing(adapter):
                for i, (owner, numbers) in enumerate(work):
                    if owner == a:
                        found[i] = score_of(self.task, self.carrier.model, self.tokens, numbers, rows, self.device)
        return found

    def generate(
        self, adapters: Sequence[Adapter], work: Work, settings: GenerationSettings, pad_id: int, eos: Sequence[int]
    ) -> list[list[list[int]]]:
        """Return the generated ids for each row of each (adapter, row numbers) of the work."""
        from sheepfold.evaluation.generation import generate

        answers = []
        for a, numbers in work:
            prompts = [self.tokens.prompt(int(n)) for n in numbers]
            with self._showing(adapters[a]):
                model = self.carrier.model
                made = generate(model, prompts, settings, seed=self.seed, pad_token_id=pad_id, eos_token_ids=eos)
            answers.append(made)
        return answers

    @contextmanager
    def _showing(self, adapter: Adapter) -> Iterator[None]:
        """Let the model carry an adapter for evaluation: without dropout, which PEFT's fresh layers have on.

        One without any tensor is the bare base.
        """
        self.side.put(Adapter())
        if adapter.tensors():
            self.carrier.write(adapter)
        bare = contextlib.nullcontext() if adapter.tensors() else self.carrier.model.disable_adapter()
        self.carrier.model.eval()
        with bare:
            yield

    @property
    def bare(self) -> Adapter | None:
        """An adapter without tensors for methods whose fresh one may change something: virtual tokens are random."""
        return Adapter() if isinstance(self.carrier, PeftCarrier) else None

    def close(self) -> None:
        """Nothing to put back: PEFT keeps the model."""


@dataclass(slots=True)
class _Job:
    """One client's local training while it runs: what trains, under which rule."""

    client: Local
    params: Mapping[str, Tensor]
    """flat name -> parameter, of what trains this round"""
    rule: LocalRule
    anchor: Mapping[str, Tensor]
    correction: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Sums over good steps, where the rule asks for their mean"""

    def factors(self) -> Factors:
        """Return what a penalty looks at, as a cohort of one."""
        ranks = {n.removesuffix("/A"): torch.tensor([len(p)], device=p.device) for n, p in self._start("/A").items()}
        now = {name: p[None] for name, p in self.params.items()}
        return Factors(now, {name: t[None] for name, t in self.anchor.items()}, ranks)

    def _start(self, ending: str) -> dict[str, Tensor]:
        return {n: t for n, t in self.client.start.tensors().items() if n.endswith(ending)}

    def correct(self, *, good: bool) -> None:
        """Add up the clipped gradients of a good step, and correct them as the rule says."""
        for name, p in self.params.items():
            assert p.grad is not None
            if self.rule.mean_gradient and good:
                self.gradients[name] = self.gradients.get(name, torch.zeros_like(p.grad)) + p.grad
            if name in self.correction:
                p.grad.add_(self.correction[name])
