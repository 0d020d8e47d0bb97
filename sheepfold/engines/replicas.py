"""One client's batch over several devices of one process, each with a replica of the model.

    step's rows ── parts ──▶ device 0: parts 0, 2, ...  ─┐ gradients, summed on device 0,
                             device 1: parts 1, 3, ...  ─┘ where the one optimizer steps

A part's loss is its sum over the targets of the whole step, so the sum of all parts' gradients is the gradient of the
step's token mean, as on one device.
"""

import copy
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from sheepfold.engines.common import Local
from sheepfold.engines.job import Part
from sheepfold.engines.peft_model import PeftModelEngine


class ReplicaEngine(PeftModelEngine):
    """Trains any adapter through PEFT, each client's rows spread over devices; one device evaluates."""

    def __init__(self, model: Any, *of: Any, devices: Sequence[torch.device], **client: Any) -> None:
        """Make an engine whose model is on the first of the devices; see PeftModelEngine for the rest.

        A device that is named twice gets two replicas, which take turns there.
        """
        copies = [copy.deepcopy(model).to(device) for device in devices[1:]]
        super().__init__(model, *of, **client)
        self._others = [PeftModelEngine(other, *of, **client) for other in copies]
        self.models += copies
        self._params: list[dict[str, Tensor]] = []
        self._at_once = len(set(devices)) == len(devices)

    def started(self, client: Local) -> dict[str, Tensor]:
        """Let every replica carry what a client starts from; return what trains on the first device."""
        params = super().started(client)
        self._params = [params, *(other.started(client) for other in self._others)]
        return params

    def part_rows(self, rows: int) -> int:
        """Return how many of a step's rows share a forward pass: at most one device's share of them."""
        return min(self.plan.micro_rows, math.ceil(rows / (1 + len(self._others))))

    def descended(self, parts: Sequence[Part], targets: int, scale: float) -> float:
        """Add the gradients of a step's rows, from all devices; return the sum of their losses over `targets`."""
        first, *others = self._params
        for params in others:
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(first[name])
                    p.grad = torch.zeros_like(p)
        engines = [self, *self._others]
        work = [(engine, parts[i :: len(engines)], targets, scale) for i, engine in enumerate(engines)]
        if self._at_once:
            with ThreadPoolExecutor(len(work)) as threads:
                loss = sum(threads.map(_share, *zip(*work, strict=True)))
        else:
            loss = sum(starmap(_share, work))
        for params in others:
            for name, p in params.items():
                grad, summed = p.grad, first[name].grad
                assert grad is not None
                assert summed is not None
                summed.add_(grad.to(summed.device))
        return loss


def _share(engine: PeftModelEngine, parts: Sequence[Part], targets: int, scale: float) -> float:
    """Return what one device's parts come to; their gradients are in its replica."""
    model, device = engine.carrier.model, engine.device
    return sum(engine.descend(model, part, targets, scale, device) for part in parts)
