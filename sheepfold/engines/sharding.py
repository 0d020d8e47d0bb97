"""A model cut over processes with FSDP2 (torch's fully_shard), one GPU each: each block is whole only while it runs.

    process 0   ┌ 1/n of every weight ┐  gathered, block by block, for the forward and the backward pass,
    process 1   └ 1/n of every weight ┘  and dropped again; each process has 1/n of a step's rows

Adapters are small and stay whole everywhere, outside of FSDP: their gradients are summed over the processes at the end
of a step, and whatever looks at them (clipping, a method's penalty or correction, ranks that differ) looks at plain
tensors. With method full the weights themselves train: weight, gradient and moments of each number lie in one process.

Accelerate has a plugin for FSDP, which is not used: on a CPU it silently trains with DistributedDataParallel instead,
and its one optimizer for the whole run has no place for clients that begin anew each round.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings
from sheepfold.devices import group
from sheepfold.engines.carriers import FullCarrier, carrier, check_whole
from sheepfold.engines.job import Part, seeded
from sheepfold.engines.lockstep import LockstepEngine
from sheepfold.layers import layer_list
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM


class ShardedEngine(LockstepEngine):
    """Trains any adapter but soft prompts, or all weights, on a model that no process has whole."""

    def __init__(
        self,
        model: Any,
        sites: Sequence[str],
        *of: Any,
        device: torch.device,
        seed: int,
        task: Task = CAUSAL_LM,
        beyond_peft: bool = False,
        only: Sequence[str] | None = None,
        **client: Any,
    ) -> None:
        """Make this process's engine; `model` may lie on the CPU, this process's share of it goes to the device.

        of: as in PeftModelEngine, the adapter's settings last.
        """
        adapter: AdapterSettings = of[-1]
        self.whole_weights = adapter.method == "full"
        if self.whole_weights:
            mesh = shard(model, device)
            carried: Any = ShardedWeights(model, only)
        else:
            names = [name for part in task.whole(model).values() for name in part] if adapter.method == "lora" else []
            carried = carrier(model, sites, adapter, seed, beyond_peft=beyond_peft, task=task)
            mesh = shard(model, device, [model.get_parameter(name) for name in names])
        client |= {"seed": seed, "task": task, "carried": carried}
        super().__init__(model, sites, *of, **client)
        self.device, self.mesh = device, mesh

    def part_rows(self, rows: int) -> int:
        """Return how many of a step's rows share a forward pass: at most one process's share of them."""
        return min(self.plan.micro_rows, math.ceil(rows / group.world()))

    def descended(self, parts: Sequence[Part], targets: int, scale: float) -> float:
        """Add the gradients of a step's rows, from all processes; return the sum of their losses over `targets`.

        All processes take equally many passes, since each gathers weights from all: one without rows left repeats the
        first part with weight zero.
        """
        mine, turns = parts[group.rank() :: group.world()], math.ceil(len(parts) / group.world())
        # FSDP gives the mean over processes
        grown = scale * group.world() if self.whole_weights else scale
        loss = sum(self.descend(self.carrier.model, part, targets, grown, self.device) for part in mine)
        for _ in range(turns - len(mine)):
            self._nothing(parts[0])
        if not self.whole_weights:
            self._add_up([p for p in self.carrier.factors().values() if p.requires_grad])
        return float(self._summed(torch.tensor(loss, dtype=torch.float64, device=self.device)))

    def _nothing(self, part: Part) -> None:
        with seeded(self.device, part.seed):
            losses = self.task.predict(self.carrier.model, self.tokens, part.rows, self.device).losses()
            torch.autograd.backward(losses.sum() * 0.0)

    def norm(self, params: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of all gradients together, of all processes' shares."""
        if not self.whole_weights:
            return super().norm(params)
        own = [_own(p.grad).double().square().sum() for p in params if p.grad is not None]
        return self._summed(torch.stack(own).sum()).sqrt()

    def clip(self, params: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        """Scale all gradients down where their norm is above a bound, as torch does."""
        if not self.whole_weights:
            return super().clip(params, bound, norm)
        factor = min(1.0, bound / (float(norm) + 1e-6))
        for p in params:
            assert p.grad is not None
            p.grad.mul_(factor)
        return None

    def placed(self, tensor: Tensor, param: Tensor) -> Tensor:
        """Return a tensor of a parameter's shape, cut as the parameter is."""
        return cut_like(tensor, param) if self.whole_weights else super().placed(tensor, param)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return what `placed` took apart, whole and on the CPU."""
        return gathered(tensor).cpu() if self.whole_weights else super().whole(tensor)

    def _summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor that is its own."""
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def _add_up(self, params: Sequence[Tensor]) -> None:
        """Give every process the sum of all processes' gradients: one message for each number format."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in params:
            assert p.grad is not None
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for grads in by_dtype.values():
            flat = self._summed(torch.cat([grad.reshape(-1) for grad in grads]))
            for grad, summed in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                grad.copy_(summed.view_as(grad))


class ShardedWeights(FullCarrier):
    """All weights of a sharded model, or some by name; reading and writing takes all processes at once."""

    def write(self, adapter: Adapter) -> None:
        check_whole(self._trained, adapter)
        with torch.no_grad():
            for name, tensor in adapter.extra.items():
                param = self._trained[name]
                _own(param).copy_(_own(cut_like(tensor, param)))

    def read(self) -> Adapter:
        return Adapter(extra={name: gathered(p.detach()).cpu().clone() for name, p in self._trained.items()})


def shard(model: Any, device: torch.device, besides: Sequence[nn.Parameter] = ()) -> Any:
    """Cut a model's frozen parameters over all processes: each block by itself, and what is in none together.

    Parameters that train by now, and those `besides`, stay whole in every process. Returns the mesh of processes.
    Raises ModelError where the blocks of a model are not found.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    every = list(model.parameters())
    whole = {p for p in every if p.requires_grad} | set(besides)
    for p in whole:
        p.data = p.data.to(device)
    talking = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
    mesh = DeviceMesh.from_group(talking, device.type)
    for block in model.get_submodule(layer_list(model)):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return mesh


def cut_like(tensor: Tensor, param: Any) -> Tensor:
    """Return a tensor that every process has whole, cut as a sharded parameter is; nothing travels."""
    from torch.distributed.tensor import distribute_tensor

    at = tensor.to(param.device, param.dtype)
    return distribute_tensor(at, param.device_mesh, param.placements, src_data_rank=None)


def gathered(tensor: Any) -> Tensor:
    """Return a sharded tensor whole, in every process."""
    full: Tensor = tensor.full_tensor()
    return full


def _own(tensor: Any) -> Tensor:
    """Return this process's share."""
    share: Tensor = tensor.to_local()
    return share
