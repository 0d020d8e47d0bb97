"""A model trained by all processes together through DeepSpeed's ZeRO, set up by Accelerate (arXiv:1910.02054).

    stage 1   each process has 1/n of the optimizer's moments (and of float32 copies of what trains)
    stage 2   and of the gradients
    stage 3   and of the weights, frozen ones too

The optimizer is the run's own, of torch.optim: DeepSpeed would put its fused ones in place of a name in its options, so
options that name one are refused. A process's loss is the sum over its rows, divided by the targets of the whole step
and multiplied by the number of processes, since ZeRO takes the mean over them. DeepSpeed is set up once; each client
begins with its own numbers and an optimizer without memory, in the same engine.
"""

import math
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sheepfold.adapter import Adapter
from sheepfold.devices import group
from sheepfold.engines.carriers import Carrier
from sheepfold.engines.common import Local
from sheepfold.engines.job import Part, seeded
from sheepfold.engines.lockstep import LockstepEngine
from sheepfold.engines.zero_options import zero_options
from sheepfold.errors import AdapterMismatch, require
from sheepfold.local.rules import LocalRule
from sheepfold.local.steps import lr_factor, step_rows


class ZeroEngine(LockstepEngine):
    """Trains LoRA of one rank, or all weights, element-wise optimizers, no penalties; see `spreading.check`."""

    def __init__(self, model: Any, sites: Sequence[str], *of: Any, device: torch.device, **client: Any) -> None:
        """Make this process's engine; DeepSpeed takes the model over with the first adapter that it carries.

        of: as in PeftModelEngine.
        """
        require("train.sharding deepspeed", "deepspeed", "accelerate", "deepspeed")
        dtype = next(model.parameters()).dtype
        super().__init__(model, sites, *of, **client)
        self.zero = ZeroCarrier(self.carrier, zero_options(self.settings, dtype), device, self._optimizer)
        self.carrier, self.device = self.zero, device

    def _optimizer(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        return self.build(params, self.settings.lr)

    def part_rows(self, rows: int) -> int:
        """Return how many of a step's rows share a forward pass: at most one process's share of them."""
        return min(self.plan.micro_rows, math.ceil(rows / group.world()))

    def _train_one(self, client: Local, rule: LocalRule) -> None:
        began = time.perf_counter()
        self.zero.write(client.start)
        self.side.put(client.assignment.side)
        self.zero.forget()
        self.carrier.model.train()
        for step in range(client.steps):
            self._zero_step(client, step)
            self.on_step(1)
        self.carrier.model.eval()
        client.adapter = self.zero.read()
        client.seconds = {"train": time.perf_counter() - began}

    def _zero_step(self, client: Local, step: int) -> None:
        """Take one step. A bad one is left out; unlike elsewhere, Adam's count of steps does not go on by it."""
        a, settings = client.assignment, self.settings
        rows = step_rows(self.seed, a.client, client.rows, settings.batch_rows, a.first_step + step)
        targets = int(self.targets[rows].sum())
        loss, good = math.nan, False
        if targets:
            loss = self.descended(self._parts(rows, ("dropout", a.round, a.client, step)), targets, 1.0)
            good = self.zero.step(a.lr * lr_factor(settings, step, client.steps)) and math.isfinite(loss)
        client.count(loss, targets, [self.tokens.length(n) for n in rows], good=good)

    def descended(self, parts: Sequence[Part], targets: int, scale: float) -> float:
        """Add the gradients of a step's rows; return the sum of all processes' losses over `targets`.

        All processes take equally many passes: one without rows left repeats the first part with weight zero. Where a
        loss is not finite, gradients are made so too, by which DeepSpeed leaves the step out.
        """
        world, loss = group.world(), 0.0
        mine = parts[group.rank() :: world]
        turns = math.ceil(len(parts) / world)
        for turn in range(turns):
            part, weight = (mine[turn], scale * world) if turn < len(mine) else (parts[0], 0.0)
            with seeded(self.device, part.seed):
                losses = self.task.predict(self.zero.engine, self.tokens, part.rows, self.device).losses()
                nats = losses.sum() / targets
                loss += float(nats.detach().double()) if weight else 0.0
                if last := turn == turns - 1:
                    loss = _summed(loss)
                    weight = weight if math.isfinite(loss) else math.nan
                self.zero.engine.set_gradient_accumulation_boundary(last)
                self.zero.engine.backward(nats * weight, scale_wrt_gas=False)
        return loss


class ZeroCarrier:
    """A carrier whose model DeepSpeed has; reading and writing takes all processes at once."""

    def __init__(self, inner: Carrier, options: dict[str, Any], device: torch.device, optimizer: Any) -> None:
        """optimizer: makes the run's own, for some parameters."""
        self.model, self._inner = inner.model, inner
        self._options, self._device, self._make = options, device, optimizer
        self._held = Adapter()
        self._params: dict[str, Any] = {}
        self.engine: Any = None

    def factors(self) -> dict[str, Tensor]:
        """See Carrier; under stage 3 they are empty until they are gathered."""
        return self._params or self._inner.factors()

    def write(self, adapter: Adapter) -> None:
        """See Carrier. Raises AdapterMismatch for ranks other than those of the first adapter, too."""
        if self.engine is None:
            self._inner.write(adapter)
            self.model, self._held, self._params = self._inner.model, adapter, self._inner.factors()
            self._set_up()
            return
        tensors, had = adapter.tensors(), self._held.tensors()
        for name in tensors.keys() | had.keys():
            if name not in tensors or name not in had or tensors[name].shape != had[name].shape:
                raise AdapterMismatch(
                    f"{name}: not as in the first adapter of the run; DeepSpeed trains equal ranks, fsdp takes any"
                )
        for name, p in self._params.items():
            with self._gathered(p, write=True), torch.no_grad():
                p.data.copy_(tensors[name])
        self._held = adapter
        self.engine.optimizer.refresh_fp32_params()

    def read(self) -> Adapter:
        """See Carrier."""
        if self.engine is None:
            return self._inner.read()
        return self._held.holding({name: self._whole(p) for name, p in self._params.items()})

    def forget(self) -> None:
        """Begin with an optimizer as it is when it was just made."""
        self.engine.optimizer.optimizer.state.clear()

    def step(self, lr: float) -> bool:
        """Take a step at a learning rate; return whether gradients were finite: else it was left out."""
        zero = self.engine.optimizer
        for of in zero.param_groups:
            of["lr"] = lr
        self.engine.step()
        return not zero.overflow

    def _whole(self, param: Any) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if param.dtype != torch.float32:  # what was trained is the float32 copy
            full: Tensor = safe_get_full_fp32_param(param)
            return full.cpu().clone()
        with self._gathered(param, write=False):
            return param.detach().cpu().clone()  # type: ignore[no-any-return]

    def _gathered(self, param: Any, *, write: bool) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([param], modifier_rank=0 if write else None)

    def _set_up(self) -> None:
        """Give the model to DeepSpeed. It reads the environment, as its launchers set it, for what it runs on."""
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # else Accelerate takes DistributedDataParallel on a CPU
        if self._device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        from accelerate import Accelerator, DeepSpeedPlugin

        for p in self._params.values():
            p.requires_grad_(True)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._options))
        optimizer = self._make(list(self._params.values()))
        self.engine, _ = accelerator.prepare(self._inner.model, optimizer)
        self.engine.optimizer.check_grad_overflow = True


def _summed(number: float) -> float:
    """Return the sum over all processes of a number that is each one's own."""
    import torch.distributed as dist

    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
