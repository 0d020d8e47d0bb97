"""The reference engine: plain PEFT on a plain transformers model, one client at a time.

It trains any PEFT method, and all weights (`adapter.method: full`); the cohort engine is measured against it. The same
rows, steps, learning rates, clipping and loss as there, written the ordinary way.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepfold.adapter import Adapter, kind
from sheepfold.config import AdapterSettings, GenerationSettings, TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.engines.carriers import Carrier, PeftCarrier, SideHooks, carrier
from sheepfold.engines.common import FIRST_LOSS_SCALE, Local, LocalEngine, Work, score_of
from sheepfold.engines.job import Job, Part, seeded
from sheepfold.engines.recomputing import can_recompute, recomputing
from sheepfold.local import optimizers
from sheepfold.local.rules import LocalRule
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
        self.carrier, self.models = carried, [model]
        self.can_recompute = can_recompute(model, adapter.method)

    def initial(self) -> Adapter:
        """Return the adapter as PEFT initialises it, from this run's seed."""
        return self.carrier.read()

    def train_pass(self, clients: Sequence[Local], rule: LocalRule | None) -> None:
        """Take these clients through their round, one after the other."""
        with recomputing(self.models, self.plan.recompute):
            for client in clients:
                self._train_one(client, rule or LocalRule())

    def _train_one(self, client: Local, rule: LocalRule) -> None:
        began = time.perf_counter()
        a = client.assignment
        anchor = self._values(client.anchor) if rule.penalty else {}
        params = self.started(client)
        job = Job(client, params, rule, {name: anchor[name] for name in params if name in anchor})
        if rule.correction:
            job.correction = {n: self.placed(t, params[n]) for n, t in rule.correction(a, client.own).items()}
        optimizer = self.build(params.values(), a.lr)
        scale = FIRST_LOSS_SCALE if self.half else 1.0
        for step in range(client.steps):
            scale = self._step(job, step, optimizer, scale)
            self.on_step(1)
        self.carrier.model.eval()
        client.adapter = self.carrier.read()
        client.mean_gradient = {n: self.whole(g / max(1, client.good_steps)) for n, g in job.gradients.items()}
        # one figure: plain loops overlap nothing, and splitting it would need a synchronisation at every call
        client.seconds = {"train": time.perf_counter() - began}

    def started(self, client: Local) -> dict[str, Tensor]:
        """Let the model carry what a client starts from; return what trains, by flat name."""
        a = client.assignment
        self.carrier.write(client.start)
        self.side.put(a.side)
        params = self.carrier.factors()
        for name, p in params.items():
            p.requires_grad_(kind(name) not in a.frozen)
        self.carrier.model.train()  # for the adapter's own dropout; the base's is silent
        return {name: p for name, p in params.items() if p.requires_grad}

    def placed(self, tensor: Tensor, param: Tensor) -> Tensor:
        """Return a tensor of a parameter's shape where and as the parameter is."""
        return tensor.to(param)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return what `placed` took apart, whole and on the CPU."""
        return tensor.cpu()

    def norm(self, params: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of all gradients together."""
        norms = [torch.linalg.vector_norm(p.grad) for p in params if p.grad is not None]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def clip(self, params: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        """Scale all gradients down where their norm is above a bound."""
        torch.nn.utils.clip_grad_norm_(params, bound)

    def _values(self, adapter: Adapter) -> dict[str, Tensor]:
        self.carrier.write(adapter)
        return {name: p.detach().clone() for name, p in self.carrier.factors().items()}

    def _step(self, job: Job, step: int, optimizer: torch.optim.Optimizer, scale: float) -> float:
        """Take one step; return the loss scale to go on with (float16)."""
        client, settings = job.client, self.settings
        a, params = client.assignment, list(job.params.values())
        rows = step_rows(self.seed, a.client, client.rows, settings.batch_rows, a.first_step + step)
        targets = int(self.targets[rows].sum())
        parts = self._parts(rows, ("dropout", a.round, a.client, step))
        while True:
            loss = self._gradients(job, parts, targets, scale)
            norm = self.norm(params)
            if scale <= 1.0 or bool(torch.isfinite(norm)) or not np.isfinite(loss):
                break
            scale /= 2
        good = bool(np.isfinite(loss)) and bool(torch.isfinite(norm))
        if settings.grad_norm is not None:
            self.clip(params, settings.grad_norm, norm)
        job.correct(good=good)
        optimizer.param_groups[0]["lr"] = a.lr * lr_factor(settings, step, client.steps)
        with contextlib.nullcontext() if good else optimizers.standing_still(optimizer, params):
            optimizer.step()
        client.count(loss, targets, [self.tokens.length(n) for n in rows], good=good)
        return scale

    def _parts(self, rows: np.ndarray, address: tuple[str | int, ...]) -> list[Part]:
        """Return the step's rows, cut into forward passes, each with dropout masks of its own."""
        size = self.part_rows(len(rows))
        firsts = range(0, len(rows), size)
        return [Part(rows[first : first + size], derive(self.seed, *address, first)) for first in firsts]

    def part_rows(self, rows: int) -> int:
        """Return how many of a step's rows share a forward pass."""
        return self.plan.micro_rows

    def _gradients(self, job: Job, parts: Sequence[Part], targets: int, scale: float) -> float:
        """Fill the gradients of a step and return its loss: the token mean over all its rows."""
        for p in job.params.values():
            p.grad = torch.zeros_like(p)
        if not targets:
            return float("nan")
        total = self.descended(parts, targets, scale)
        if job.rule.penalty is not None and (penalty := job.rule.penalty(job.factors()).sum()).requires_grad:
            torch.autograd.backward(penalty * scale)
        for p in job.params.values():
            if scale != 1.0 and p.grad is not None:
                p.grad.div_(scale)
        return total

    def descended(self, parts: Sequence[Part], targets: int, scale: float) -> float:
        """Add the gradients of a step's rows, times the loss scale; return the sum of their losses over `targets`."""
        return sum(self.descend(self.carrier.model, part, targets, scale, self.device) for part in parts)

    def descend(self, model: Any, part: Part, targets: int, scale: float, device: torch.device) -> float:
        """Add one part's gradients to those of a model on a device; return its share of the step's loss."""
        with seeded(device, part.seed):
            nats = self.task.predict(model, self.tokens, part.rows, device).losses().sum() / targets
            torch.autograd.backward(nats * scale)  # inside: checkpointing draws again
        return float(nats.detach().double())

    def _scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
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
