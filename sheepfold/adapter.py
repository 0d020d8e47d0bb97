"""Adapters as values, and their algebra.

An adapter is a set of pairs, one per adapted weight: W becomes W + scale * B @ A. Adapters can be averaged factor by
factor (`Average`), or exactly, by stacking their factors (`stack`):

    sum_k p_k s_k B_k A_k  =  [p_1 s_1 B_1 | p_2 s_2 B_2 | ...] @ [A_1; A_2; ...]

Nothing here forms a dense d_out x d_in matrix except `LoraPair.delta`, which tests and exports ask for.
"""

import hashlib
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

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the dense update scale * B @ A, (d_out, d_in)."""
        return self.scale * (self.B.to(dtype) @ self.A.to(dtype))

    def norm(self) -> float:
        """Return the Frobenius norm of the update, from the factors alone.

        ||B A||_F^2 = sum((B^T B) * (A A^T)), an (r, r) product.
        """
        A, B = self.A.double(), self.B.double()
        return abs(self.scale) * float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True, slots=True)
class Adapter:
    """What travels: the pairs by module path, and whole tensors (heads, soft prompts, full layers) by name."""

    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every pair, by module path."""
        return {name: pair.rank for name, pair in self.pairs.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a flat name ('layers.0.q_proj/A'), in a fixed order."""
        flat: dict[str, Tensor] = {}
        for name in sorted(self.pairs):
            flat[f"{name}/A"], flat[f"{name}/B"] = self.pairs[name].A, self.pairs[name].B
        return flat | {f"{name}/extra": self.extra[name] for name in sorted(self.extra)}

    def nbytes(self) -> int:
        """Return the bytes of all tensors, as they are stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def hash(self) -> str:
        """Return a SHA-256 over names, scales, shapes, dtypes and bits: equal hashes mean equal adapters."""
        digest = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            digest.update(f"{name}={pair.scale!r};".encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> "Adapter":
        """Return the adapter with its floating-point tensors in another dtype or on another device."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if dtype and t.is_floating_point() else None)

        return Adapter(
            {n: LoraPair(move(p.A), move(p.B), p.scale) for n, p in self.pairs.items()},
            {n: move(t) for n, t in self.extra.items()},
        )

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors().values() if t.is_floating_point())


def from_tensors(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> Adapter:
    """Return the adapter that `Adapter.tensors` and its scales came from."""
    pairs = {name: LoraPair(tensors[f"{name}/A"], tensors[f"{name}/B"], scale) for name, scale in scales.items()}
    extra = {key.removesuffix("/extra"): t for key, t in tensors.items() if key.endswith("/extra")}
    return Adapter(pairs, extra)


class Average:
    """A running weighted mean of adapters, factor by factor, in float64: memory stays at one adapter.

    A = sum p_k A_k, B = sum p_k B_k, with p_k = w_k / sum w. Source: FedAvg, arXiv:1602.05629, Algorithm 1, applied to
    the factors as FedIT does (arXiv:2305.05644). The mean of factors is not the mean of products: see `stack`.
    Tensors come back in float32 (float64 where they came in float64).
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._scales: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, adapter: Adapter, weight: float, who: str = "an adapter") -> None:
        """Add one adapter. Raises AdapterMismatch for other modules, ranks, shapes or scales than the first one's."""
        tensors = adapter.tensors()
        scales = {name: pair.scale for name, pair in adapter.pairs.items()}
        if not self._sums:
            self._scales = scales
            self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items()}
            self._dtypes = {name: t.dtype for name, t in tensors.items()}
        self._check(tensors, scales, who)
        for name, tensor in tensors.items():
            self._sums[name].add_(tensor.detach().double(), alpha=weight)
        self.weight += weight

    def finish(self) -> Adapter:
        """Return the mean of what was added; raises AdapterMismatch where nothing was, or the weights sum to zero."""
        if not self.weight > 0:
            raise AdapterMismatch(f"nothing to average: the weights sum to {self.weight}")
        wide = {n: torch.float64 if d == torch.float64 else torch.float32 for n, d in self._dtypes.items()}
        return from_tensors({n: (s / self.weight).to(wide[n]) for n, s in self._sums.items()}, self._scales)

    def _check(self, tensors: Mapping[str, Tensor], scales: Mapping[str, float], who: str) -> None:
        if odd := sorted(tensors.keys() ^ self._sums.keys()):
            raise AdapterMismatch(f"{who}: {odd[0]} is in one adapter only; all clients must adapt the same modules")
        for name, tensor in tensors.items():
            if tensor.shape != self._sums[name].shape:
                raise AdapterMismatch(
                    f"{who}, {name}: shape {tuple(tensor.shape)}, expected {tuple(self._sums[name].shape)}; "
                    "factor means need equal ranks: flora and flexlora accept mixed ranks"
                )
        for name, scale in scales.items():
            if scale != self._scales[name]:
                raise AdapterMismatch(f"{who}, {name}: alpha / r is {scale}, expected {self._scales[name]}")


def mean(parts: Iterable[tuple[Adapter, float]]) -> Adapter:
    """Return the weighted mean of adapters, factor by factor (see `Average`)."""
    average = Average()
    for adapter, weight in parts:
        average.add(adapter, weight)
    return average.finish()


def stack(parts: Sequence[tuple[LoraPair, float]]) -> LoraPair:
    """Return one pair whose delta is the weighted mean of the deltas, exactly: its rank is the sum of the ranks.

    Source: FLoRA, arXiv:2409.05976, eq. 5, with alpha / r folded into B, so mixed ranks and scales are exact.
    """
    total = sum(weight for _, weight in parts)
    if not total > 0:
        raise AdapterMismatch(f"nothing to stack: the weights sum to {total}")
    A = torch.cat([pair.A for pair, _ in parts])
    B = torch.cat([pair.B * (weight / total * pair.scale) for pair, weight in parts], dim=1)
    return LoraPair(A, B, 1.0)


def best_rank(pair: LoraPair, rank: int, scale: float = 1.0) -> LoraPair:
    """Return the rank-`rank` pair nearest to this one in Frobenius norm, with the scale asked for.

    QR of both factors and an SVD of the small core, never of the dense product: B A = Q_B (R_B R_A^T) Q_A^T, and the
    truncated SVD of the core is optimal for the product (Eckart-Young). A = V_r^T, B = U_r S_r / scale, as FlexLoRA
    redistributes (arXiv:2402.11505, section 3.2). Where `rank` exceeds the product's, zero rows fill up.
    Computed in float64 and returned in the pair's dtype.
    """
    if rank < 1:
        raise AdapterMismatch(f"rank {rank}: must be at least 1")
    Q_b, R_b = torch.linalg.qr(pair.scale * pair.B.double())
    Q_a, R_a = torch.linalg.qr(pair.A.double().T)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)
    keep = min(rank, S.numel())
    A = (Vh[:keep] @ Q_a.T).to(pair.A.dtype)
    B = ((Q_b @ U[:, :keep]) * (S[:keep] / scale)).to(pair.B.dtype)
    return pad(LoraPair(A, B, scale), rank)


def pad(pair: LoraPair, rank: int) -> LoraPair:
    """Return the pair with zero rows of A and zero columns of B up to `rank`: the same delta, the same scale.

    Both gradients of the padding are zero, so training leaves it zero.
    """
    missing = rank - pair.rank
    if missing < 0:
        raise AdapterMismatch(f"rank {pair.rank} cannot be padded to {rank}; truncate it, or take best_rank")
    A = torch.cat([pair.A, pair.A.new_zeros(missing, pair.A.shape[1])])
    B = torch.cat([pair.B, pair.B.new_zeros(pair.B.shape[0], missing)], dim=1)
    return LoraPair(A, B, pair.scale)


def truncate(pair: LoraPair, rank: int) -> LoraPair:
    """Return the first `rank` rows of A and columns of B, with the scale unchanged."""
    if not 1 <= rank <= pair.rank:
        raise AdapterMismatch(f"rank {pair.rank} cannot be truncated to {rank}")
    return LoraPair(pair.A[:rank].clone(), pair.B[:, :rank].clone(), pair.scale)


def subtract(left: LoraPair, right: LoraPair) -> LoraPair:
    """Return a pair whose delta is left's minus right's, exactly: its rank is the sum of both."""
    A = torch.cat([left.A, right.A])
    B = torch.cat([left.B * left.scale, right.B * -right.scale], dim=1)
    return LoraPair(A, B, 1.0)
