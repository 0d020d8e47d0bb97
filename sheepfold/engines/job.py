"""One client's local training while it runs: what trains, and the parts that each of its steps is cut into."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sheepfold.engines.common import Local
from sheepfold.local.rules import Factors, LocalRule


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one step that go through the model together."""

    rows: np.ndarray
    seed: int
    """Of their dropout masks: the same wherever the part is computed"""


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let a device's random numbers follow from a seed, and go on afterwards as if nothing had been drawn.

    Of one GPU's generator alone, so that several GPUs may draw at once, each in a thread of its own.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            before = torch.cuda.get_rng_state()
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
            try:
                yield
            finally:
                torch.cuda.set_rng_state(before)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(slots=True)
class Job:
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
