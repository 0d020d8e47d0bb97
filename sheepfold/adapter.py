"""Adapters as values, and their algebra.

An adapter is a set of pairs, one per adapted weight: W becomes W + scale * B @ A. They are averaged factor by factor
here (`Average`), and product by product in products.py.

Two further kinds of change: a pair may have a small matrix between its factors (Fed-SB trains only that), and a weight
may change at a few positions alone (SLoRA's first stage). `Adapter.plain` turns both into pairs.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sheepfold.errors import AdapterMismatch


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One adapted weight, W + scale * B @ A."""

    A: Tensor
    """(r, d_in)"""
    B: Tensor
    """(d_out, r)"""
    scale: float
    """alpha / r"""
    core: Tensor | None = None
    """(r, r), where there is one: the update is then scale * B @ core @ A"""

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]

    def plain(self) -> "LoraPair":
        """Return the same update without a core: it is multiplied into B."""
        if self.core is None:
            return self
        B = (self.B.double() @ self.core.double()).to(self.B.dtype)
        return LoraPair(self.A, B, self.scale)

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the dense update scale * B @ A, (d_out, d_in)."""
        A, B = self.A.to(dtype), self.B.to(dtype)
        B = B if self.core is None else B @ self.core.to(dtype)
        if _is_identity(A) or _is_identity(B):  # what `from_delta` made: its other factor is the update
            return self.scale * (B if _is_identity(A) else A)
        return self.scale * (B @ A)

    def norm(self) -> float:
        """Return the Frobenius norm of the update, from the factors alone.

        ||B A||_F^2 = sum((B^T B) * (A A^T)), an (r, r) product.
        """
        A, B = self.A.double(), self.B.double()
        B = B if self.core is None else B @ self.core.double()
        return abs(self.scale) * float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def _is_identity(t: Tensor) -> bool:
    return t.shape[0] == t.shape[1] and torch.equal(t, torch.eye(len(t), dtype=t.dtype, device=t.device))


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """A weight that changes at some positions alone, W[positions] + values."""

    values: Tensor
    """(n,)"""
    positions: Tensor
    """(n,) int64, ascending, into the row-major weight"""
    shape: tuple[int, int]
    """(d_out, d_in)"""

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the dense update, (d_out, d_in)."""
        dense = self.values.new_zeros(self.shape[0] * self.shape[1], dtype=dtype)
        dense[self.positions] = self.values.to(dtype)
        return dense.view(self.shape)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What travels: changes by module path, and whole tensors (heads, soft prompts, full layers) by name."""

    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    sparse: Mapping[str, SparseDelta] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every pair, by module path."""
        return {name: pair.rank for name, pair in self.pairs.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a flat name, path/kind ('layers.0.q_proj/A'), in a fixed order (see `kind`)."""
        flat: dict[str, Tensor] = {}
        for name in sorted(self.pairs):
            pair = self.pairs[name]
            flat[f"{name}/A"], flat[f"{name}/B"] = pair.A, pair.B
            if pair.core is not None:
                flat[f"{name}/core"] = pair.core
        for name in sorted(self.sparse):
            flat[f"{name}/values"], flat[f"{name}/positions"] = self.sparse[name].values, self.sparse[name].positions
        return flat | {f"{name}/extra": self.extra[name] for name in sorted(self.extra)}

    def holding(self, tensors: Mapping[str, Tensor]) -> "Adapter":
        """Return this adapter with some of its tensors replaced, by flat name. Raises KeyError for other names."""
        if odd := tensors.keys() - self.tensors().keys():
            raise KeyError(sorted(odd)[0])

        def get(path: str, kind: str, own: Tensor) -> Tensor:
            return tensors.get(f"{path}/{kind}", own)

        return Adapter(
            {
                n: LoraPair(
                    get(n, "A", p.A), get(n, "B", p.B), p.scale, None if p.core is None else get(n, "core", p.core)
                )
                for n, p in self.pairs.items()
            },
            {n: get(n, "extra", t) for n, t in self.extra.items()},
            {
                n: SparseDelta(get(n, "values", d.values), get(n, "positions", d.positions), d.shape)
                for n, d in self.sparse.items()
            },
        )

    def plain(self) -> "Adapter":
        """Return the same change as pairs without cores, for tools that know nothing else."""
        pairs = {name: pair.plain() for name, pair in self.pairs.items()}
        dense = {name: from_delta(d.delta(_wide(d.values))) for name, d in self.sparse.items()}
        return Adapter(pairs | dense, self.extra)

    def nbytes(self) -> int:
        """Return the bytes of all tensors, as they are stored."""
        return nbytes(self.tensors())

    @property
    def numbers_in_training(self) -> int:
        """How many numbers a client needs memory for; a sparse delta is made dense on its way through the base."""
        floats = sum(t.numel() for t in self.tensors().values() if t.is_floating_point())
        return floats + sum(d.shape[0] * d.shape[1] // 2 for d in self.sparse.values())

    def hash(self) -> str:
        """Return a SHA-256 over names, scales, shapes, dtypes and bits: equal hashes mean equal adapters."""
        digest = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            digest.update(f"{name}={pair.scale!r};".encode())
        for name, sparse in sorted(self.sparse.items()):
            digest.update(f"{name}={sparse.shape!r};".encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> "Adapter":
        """Return the adapter with its floating-point tensors in another dtype or on another device."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if dtype and t.is_floating_point() else None)

        return self.holding({name: move(tensor) for name, tensor in self.tensors().items()})

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return all_finite(self.tensors().values())


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every floating-point number of these tensors is finite.

    A finite sum has finite terms alone, and adding up is the quicker look; where it overflows, each number counts.
    """
    floats = [t for t in tensors if t.is_floating_point()]
    return math.isfinite(sum(float(t.sum()) for t in floats)) or all(bool(torch.isfinite(t).all()) for t in floats)


def kind(name: str) -> str:
    """Return what a flat name's tensor is: A, B, core, values, positions or extra."""
    return name.rpartition("/")[2]


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of some tensors, as they are stored."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def new_pair(d_in: int, d_out: int, rank: int, scale: float, draw: torch.Generator) -> LoraPair:
    """Return a pair that changes nothing yet: A random, B zero; float32 on the CPU.

    A is drawn from the Kaiming-uniform law with a = sqrt(5), so U(-1/sqrt(d_in), 1/sqrt(d_in)), as PEFT draws it (LoRA,
    arXiv:2106.09685, section 4.1, has a Gaussian). The first rows of a larger rank's draw are the smaller rank's.
    """
    A = torch.empty(rank, d_in)
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=draw)
    return LoraPair(A, torch.zeros(d_out, rank), scale)


def from_delta(dense: Tensor) -> LoraPair:
    """Return a pair of scale 1 that holds a dense update, with an identity on its smaller side."""
    d_out, d_in = dense.shape
    eye = torch.eye(min(d_out, d_in), dtype=dense.dtype, device=dense.device)
    return LoraPair(dense, eye, 1.0) if d_out <= d_in else LoraPair(eye, dense, 1.0)


def from_tensors(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    """Return the adapter that `Adapter.tensors`, its pairs' scales and its sparse deltas' shapes came from."""
    pairs = {
        name: LoraPair(tensors[f"{name}/A"], tensors[f"{name}/B"], scale, tensors.get(f"{name}/core"))
        for name, scale in scales.items()
    }
    extra = {key.removesuffix("/extra"): t for key, t in tensors.items() if key.endswith("/extra")}
    sparse = {
        name: SparseDelta(tensors[f"{name}/values"], tensors[f"{name}/positions"], (shape[0], shape[1]))
        for name, shape in (shapes or {}).items()
    }
    return Adapter(pairs, extra, sparse)


class Average:
    """A running weighted mean of adapters, factor by factor, in float64: memory stays at one adapter.

    A = sum p_k A_k, B = sum p_k B_k, with p_k = w_k / sum w. Source: FedAvg, arXiv:1602.05629, Algorithm 1, applied to
    the factors as FedIT does (arXiv:2305.05644). The mean of factors is not the mean of products: see products.py.
    Tensors come back in float32 (float64 where they came in float64).
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._like = Adapter()
        self._sums: dict[str, Tensor] = {}

    def add(self, adapter: Adapter, weight: float, who: str = "an adapter") -> None:
        """Add one adapter. Raises AdapterMismatch for other modules, ranks, shapes or scales than the first one's."""
        tensors = adapter.tensors()
        if not self._sums:
            self._like = adapter
            self._sums = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in tensors.items() if _averages(t)}
        self._check(tensors, adapter, who)
        for name in self._sums:
            self._sums[name].add_(tensors[name].detach().double(), alpha=weight)
        self.weight += weight

    def finish(self) -> Adapter:
        """Return the mean of what was added; raises AdapterMismatch where nothing was, or the weights sum to zero."""
        if not self.weight > 0:
            raise AdapterMismatch(f"nothing to average: the weights sum to {self.weight}")
        had = self._like.tensors()
        return self._like.holding({n: (s / self.weight).to(_wide(had[n])) for n, s in self._sums.items()})

    def _check(self, tensors: Mapping[str, Tensor], adapter: Adapter, who: str) -> None:
        first = self._like.tensors()
        if odd := sorted(tensors.keys() ^ first.keys()):
            raise AdapterMismatch(f"{who}: {odd[0]} is in one adapter only; all clients must adapt the same modules")
        for name, tensor in tensors.items():
            if tensor.shape != first[name].shape:
                raise AdapterMismatch(
                    f"{who}, {name}: shape {tuple(tensor.shape)}, expected {tuple(first[name].shape)}; "
                    "factor means need equal ranks: flora and flexlora accept mixed ranks"
                )
            if not _averages(tensor) and not torch.equal(tensor, first[name]):
                raise AdapterMismatch(f"{who}, {name}: other positions than the first adapter's; masks must be shared")
        for name, pair in adapter.pairs.items():
            if pair.scale != self._like.pairs[name].scale:
                raise AdapterMismatch(
                    f"{who}, {name}: alpha / r is {pair.scale}, expected {self._like.pairs[name].scale}"
                )


def _averages(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mean(parts: Iterable[tuple[Adapter, float]]) -> Adapter:
    """Return the weighted mean of adapters, factor by factor (see `Average`)."""
    average = Average()
    for adapter, weight in parts:
        average.add(adapter, weight)
    return average.finish()


def pad(pair: LoraPair, rank: int) -> LoraPair:
    """Return the pair with zero rows of A and zero columns of B up to `rank`: the same delta, the same scale.

    Both gradients of the padding are zero, so training leaves it zero.
    """
    pair, missing = pair.plain(), rank - pair.rank
    if missing < 0:
        raise AdapterMismatch(f"rank {pair.rank} cannot be padded to {rank}; truncate it, or take best_rank")
    A = torch.cat([pair.A, pair.A.new_zeros(missing, pair.A.shape[1])])
    B = torch.cat([pair.B, pair.B.new_zeros(pair.B.shape[0], missing)], dim=1)
    return LoraPair(A, B, pair.scale)


def truncate(pair: LoraPair, rank: int) -> LoraPair:
    """Return the first `rank` rows of A and columns of B, with the scale unchanged."""
    if not 1 <= rank <= pair.rank:
        raise AdapterMismatch(f"rank {pair.rank} cannot be truncated to {rank}")
    pair = pair.plain()
    return LoraPair(pair.A[:rank].clone(), pair.B[:, :rank].clone(), pair.scale)


def combined(left: Adapter, right: Adapter) -> Adapter:
    """Return one adapter that changes the base by the sum of both; whole tensors are right's.

    Stacked pairs of scale 1, as dense updates where stacking would be the larger. What only one side has comes back as
    it is, without cores.
    """
    a, b = left.plain(), right.plain()
    pairs = dict(a.pairs)
    for name, pair in b.pairs.items():
        pairs[name] = _sum(pairs[name], pair) if name in pairs else pair
    return Adapter(pairs, dict(a.extra) | dict(b.extra))


def _sum(left: LoraPair, right: LoraPair) -> LoraPair:
    if left.rank + right.rank <= min(left.A.shape[1], left.B.shape[0]):
        B = torch.cat([left.B * left.scale, right.B * right.scale], dim=1)
        return LoraPair(torch.cat([left.A, right.A]), B, 1.0)
    return from_delta((left.delta() + right.delta()).to(_wide(right.A)))
