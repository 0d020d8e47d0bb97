"""All weights of a model as w0 - lr sum_s G_s z_s: the base, and one number for each candidate direction.

    Adapter(extra={"seeds": G})     G: (candidates,) float32, sums of scalar gradients

A server and its clients rebuild by the same lines, in the same order, from the same numbers: the same bits.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sheepfold import seeded
from sheepfold.adapter import Adapter
from sheepfold.errors import AdapterMismatch, ModelError

SEEDS = "seeds"
"""The adapter's one tensor."""


def number_type(candidates: int) -> torch.dtype:
    """Return the integers that number this many candidates in messages."""
    return torch.int16 if candidates <= 1 << 15 else torch.int32


class SeedCarrier:
    """A model whose floating-point weights, tied ones once, are one long vector in the order of their names."""

    def __init__(self, model: Any, candidates: int, lr: float, seed: int) -> None:
        """Take the model's weights as w0. Raises ModelError for weights that are no plain vectors in memory."""
        self.model: Any = model.eval()
        named = sorted((n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point())
        if odd := [name for name, p in named if not p.is_contiguous()]:
            raise ModelError(f"{odd[0]}: its numbers are not in one piece, which adapter.method seeds needs")
        self._pieces = [p.view(-1) for _, p in named]
        self._ends = torch.tensor([0, *(len(p) for p in self._pieces)]).cumsum(0).tolist()
        self.device = self._pieces[0].device
        self.dtype = torch.float32
        for piece in self._pieces:
            self.dtype = torch.promote_types(self.dtype, piece.dtype)
        self._base = [piece.cpu().clone() for piece in self._pieces]
        self.keys = seeded.keys(seed, candidates).to(self.device)
        self.lr = lr
        self._carried = Adapter(extra={SEEDS: torch.zeros(candidates)})
        self._built: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def weights(self, adapter: Adapter) -> Tensor:
        """Return w0 - lr sum_s G_s z_s as one vector on the CPU, in float32 or wider; the last one is kept.

        Candidates count in ascending order, those of zero not at all. Raises AdapterMismatch for another adapter.
        """
        G = self._sums(adapter)
        if self._built is not None and torch.equal(self._built[0], G):
            return self._built[1]
        used = G.nonzero().view(-1)
        amounts = (G[used].double() * -self.lr).to(self.dtype).to(self.device)
        keys = self.keys[used.to(self.device)]
        made = torch.empty(len(self), dtype=self.dtype)
        for (start, end), base in zip(pairwise(self._ends), self._base, strict=True):
            made[start:end] = base
        for start in range(0, len(self), seeded.chunk(self.device)):
            part = made[start : start + seeded.chunk(self.device)].to(self.device)  # a copy, or the part itself
            seeded.add_directions(part, start, keys, amounts)
            made[start : start + len(part)] = part
        self._built = G.clone(), made
        return made

    def write(self, adapter: Adapter) -> None:
        """Make the model carry this adapter; raises AdapterMismatch where it does not fit."""
        self._put(0, self.weights(adapter))
        self._carried = adapter

    def read(self) -> Adapter:
        """Return the adapter that was written last."""
        return self._carried

    def factors(self) -> dict[str, Tensor]:
        """Return nothing: no parameter has a gradient."""
        return {}

    def perturb(self, weights: Tensor, candidate: int, amount: float) -> None:
        """Let the model have weights + amount z, each rounded once to the model's own dtype."""
        for start, part, z in self._along(weights, candidate):
            self._put(start, part + z * amount)

    def move(self, weights: Tensor, candidate: int, amount: float) -> None:
        """Add amount z to the weights, in place; the model stays as it is."""
        for _, part, z in self._along(weights, candidate):
            part += z * amount

    def _along(self, weights: Tensor, candidate: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the weights part by part: (first element, the part, that part of the direction)."""
        key, few = self.keys[candidate : candidate + 1], seeded.chunk(self.device)
        for start in range(0, len(self), few):
            part = weights[start : start + few]
            yield start, part, seeded.normals(key, start, len(part))[0].to(self.dtype)

    def _put(self, start: int, values: Tensor) -> None:
        """Write a part of the vector into the model."""
        end = start + len(values)
        for piece, (first, last) in zip(self._pieces, pairwise(self._ends), strict=True):
            low, high = max(first, start), min(last, end)
            if low < high:
                piece[low - first : high - first].copy_(values[low - start : high - start])

    def _sums(self, adapter: Adapter) -> Tensor:
        G = adapter.extra.get(SEEDS)
        if G is None or adapter.pairs or len(adapter.extra) > 1 or G.shape != (len(self.keys),):
            raise AdapterMismatch(
                f"an adapter of {sorted(adapter.tensors())[:2]}, expected {SEEDS} alone, of {len(self.keys)} numbers"
            )
        return G.detach().cpu()
