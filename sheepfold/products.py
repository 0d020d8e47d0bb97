"""Weighted means of low-rank products, and the nearest pair of a given rank: never a dense SVD when factors will do.

    sum_k p_k s_k B_k A_k  =  [p_1 s_1 B_1 | p_2 s_2 B_2 | ...] @ [A_1; A_2; ...],     p_k = w_k / sum w

Stacked factors say everything while their rank R stays within the smaller side of the matrix: with A^T = Q T, the
product is (B T^T) Q^T, and R columns are decomposed. From there on the dense sum is smaller than its factors, and its
leading vectors are searched for until what they miss is proven to be small. Either way the right vectors V are all it
takes: M V V^T is the projection that Eckart and Young ask for, so A = V^T and B = M V.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from sheepfold.adapter import LoraPair, from_delta, pad
from sheepfold.errors import AdapterMismatch

EXCESS = 1e-6
"""How far a searched pair's Frobenius error may lie above the least possible, as a share of it."""
SMALL = 1024
"""Columns below which an exact decomposition is as fast as a search."""
NARROW = 8
"""A search pays for ranks up to the smaller side over this."""
ROUNDS = 6
"""Searches that take more rounds than this are left to the exact decomposition."""
DEGREE = 9
"""Products with the Gram matrix between two orthonormalisations."""


class ProductSum:
    """A running weighted mean of the products of pairs of any ranks and scales, in the memory of a few such matrices.

    `dtype` is what sums are kept in and pairs come back in. In float32, what is decomposed exactly is a Gram matrix in
    float64, which sees singular values down to 1e-8 of the largest, below float32's own 1e-7; in float64 it is an SVD.
    The same pairs in the same order give the same bits.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.weight = 0.0
        self._shape: tuple[int, int] | None = None  # (d_out, d_in)
        self._parts: list[tuple[Tensor, Tensor]] = []  # (weight * scale * B, A) of the pairs not in the dense sum
        self._dense: Tensor | None = None

    def add(self, pair: LoraPair, weight: float, who: str = "a pair") -> None:
        """Add one pair. Raises AdapterMismatch for another d_out or d_in than the first one's."""
        pair = pair.plain()
        (d_out, r), (rank, d_in) = pair.B.shape, pair.A.shape
        expected = self._shape or (d_out, d_in)
        if (d_out, d_in) != expected or r != rank:
            raise AdapterMismatch(
                f"{who}: B @ A is ({d_out}, {r}) @ ({rank}, {d_in}), expected ({expected[0]}, r) @ (r, {expected[1]}); "
                "ranks may differ, sides may not"
            )
        self._shape = expected
        self.weight += weight
        B = pair.B.detach().to(self.dtype) * (weight * pair.scale)
        self._parts.append((B, pair.A.detach().to(self.dtype, copy=True)))
        if self._rank() >= (min(expected) if self._dense is None else max(1, min(expected) // 4)):
            self._collapse()

    def best_rank(self, rank: int, scale: float = 1.0) -> LoraPair:
        """Return the pair of this rank nearest to the mean in Frobenius norm (Eckart-Young), with the scale asked for.

        A = V_r^T, B = U_r S_r / scale, with singular values descending: truncated, the pair is the best of every
        smaller rank too, so ask once for the largest. Zeros fill up what exceeds the mean's own rank. Of every row of
        A the largest number is positive. While factors are kept the answer is exact to rounding; a dense sum may be
        searched, and then its error is at most 1 + EXCESS times the least possible, up to rounding of the sum itself.
        Raises AdapterMismatch for a rank outside 1 .. min(d_out, d_in).
        Source: FlexLoRA, arXiv:2402.11505, section 3.2.
        """
        d_out, d_in = self._sides()
        if not 1 <= rank <= min(d_out, d_in):
            raise AdapterMismatch(f"rank {rank} of a ({d_out}, {d_in}) matrix: choose from 1 to {min(d_out, d_in)}")
        if self._dense is None:
            B, A = (t.double() for t in self._stacked())
            QT, tau = torch.geqrf(A.T)  # Q as reflections: it is applied to a few columns, never formed
            N = B @ QT[: len(A)].triu().T
            V = self._right(N, rank, may_search=False)
            left, right = N @ V, torch.ormqr(QT, tau, functional.pad(V, (0, 0, 0, d_in - len(V)))).T
        else:
            M = self._dense
            N = M if d_in <= d_out else M.T  # the decomposition's work is cubic in the columns
            V = self._right(N, rank, may_search=True).to(M.dtype)
            left, right = (N @ V, V.T) if d_in <= d_out else (V, (N @ V).T)
        return self._pair(left / self.weight, right, rank, scale)

    def exact(self) -> LoraPair:
        """Return a pair of scale 1 whose product is the mean, of rank at most min(d_out, d_in).

        The stacked factors; or, where they outgrew it, the dense mean and an identity on its smaller side.
        """
        self._sides()
        if self._dense is not None:
            return from_delta(self._dense / self.weight)
        B, A = self._stacked()
        return LoraPair(A, B / self.weight, 1.0)

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the dense mean, (d_out, d_in)."""
        return self.exact().delta(dtype)

    def _rank(self) -> int:
        return sum(A.shape[0] for _, A in self._parts)

    def _sides(self) -> tuple[int, int]:
        """Return (d_out, d_in), with every pair where it belongs; raises AdapterMismatch where there is no mean."""
        if self._shape is None or not self.weight > 0:
            raise AdapterMismatch(f"no products to average: the weights sum to {self.weight}")
        if self._dense is not None and self._parts:
            self._collapse()
        return self._shape

    def _stacked(self) -> tuple[Tensor, Tensor]:
        return torch.cat([B for B, _ in self._parts], dim=1), torch.cat([A for _, A in self._parts])

    def _collapse(self) -> None:
        B, A = self._stacked()
        self._parts = []
        self._dense = B @ A if self._dense is None else self._dense.addmm_(B, A)

    def _right(self, N: Tensor, rank: int, may_search: bool) -> Tensor:
        """Return N's first `rank` right singular vectors, or all there are, in float64: (columns, rank)."""
        if self.dtype == torch.float64:
            Vh: Tensor = torch.linalg.svd(N, full_matrices=False).Vh
            return Vh[:rank].T
        norm = float(torch.linalg.vector_norm(N, dtype=torch.float64))
        if may_search and N.shape[1] >= max(SMALL, NARROW * rank) and 1e-12 < norm < 1e12:  # float32 holds its square
            for dtype in (torch.float32, torch.float64):
                found = search(N, _gram(N, dtype), rank, 4 * torch.finfo(self.dtype).eps * norm)
                if found is not None:
                    return found
        return _last(torch.linalg.eigh(_gram(N, torch.float64)).eigenvectors, rank)

    def _pair(self, left: Tensor, right: Tensor, rank: int, scale: float) -> LoraPair:
        """Return left @ right as A = V^T and B = U S / scale, without the noise below rounding."""
        length = right.norm(dim=1)
        S = left.norm(dim=0) * length
        keep = max(torch.finfo(self.dtype).eps, 1e-14) * S.max() < S
        largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).squeeze(1)
        sign = torch.where(largest < 0, -1.0, 1.0)
        A = torch.where(keep[:, None], right * (sign / length)[:, None], 0.0)
        B = torch.where(keep, left * (sign * length / scale), 0.0)
        return pad(LoraPair(A.to(self.dtype).contiguous(), B.to(self.dtype).contiguous(), scale), rank)


def best_rank(pair: LoraPair, rank: int, scale: float = 1.0) -> LoraPair:
    """Return the pair of this rank nearest to one pair, in that pair's dtype (see `ProductSum.best_rank`)."""
    total = ProductSum(torch.float64 if pair.A.dtype == torch.float64 else torch.float32)
    total.add(pair, 1.0)
    found = total.best_rank(rank, scale)
    return LoraPair(found.A.to(pair.A.dtype), found.B.to(pair.B.dtype), scale)


def search(N: Tensor, G: Tensor, rank: int, rounding: float) -> Tensor | None:
    """Return `rank` orthonormal vectors that hold nearly as much of G's trace as any, or None where that is unproven.

    N: (m, n); G: N^T N in float32 or float64, which sets how far down the search can see; returns (n, rank) in float64,
    the largest Ritz value first. What they miss is at most EXCESS of what the best `rank` vectors leave over, or
    rounding^2 where that is more: that bounds the squared error of N V V^T, and a half of it the error.
    Chebyshev-filtered subspace iteration: the polynomial is small from 0 to the least Ritz value held and grows fast
    above it, which a flat spectrum needs. What is proven is proven with N in float64.
    Source: Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006), 172-184.
    """
    width = rank + max(rank // 2, 32)
    V = torch.randn(G.shape[0], width, generator=torch.Generator().manual_seed(0)).to(G)
    values, V, _ = _ritz(G, G @ (G @ V))
    values, V, residuals = _ritz(G, _filter(G, V, values, DEGREE))
    energy = float(torch.linalg.vector_norm(N, dtype=torch.float64)) ** 2
    for _ in range(ROUNDS):
        top, least, cut = (float(values[i]) for i in (0, rank - 1, -1))
        left_over = energy - float(values[:rank].sum())
        allowed = max(EXCESS * left_over, rounding**2)
        missed = _missed(values, residuals, rank, (least + cut) / 2)
        slack = G.shape[0] * torch.finfo(G.dtype).eps * top
        if V.dtype == torch.float64 and (
            left_over <= allowed or (missed <= allowed and _is_below(G, values, V, (least + cut) / 2 - slack))
        ):
            return V[:, :rank]
        if least - cut < 4 * slack:
            return None  # too small for G's digits, or a cluster wider than the block
        # What is missed shrinks with the square of the polynomial at the least value wanted.
        growth = 2 * math.acosh(2 * least / max(cut, slack) - 1)
        degree = math.ceil(math.log(100 * max(missed / allowed, 1)) / growth)
        V = _filter(G, V.to(G.dtype), values, max(2, min(DEGREE, degree)))
        values, V, residuals = _ritz(G, V, N)
    return None


def _missed(values: Tensor, residuals: Tensor, rank: int, mu: float) -> float:
    """Return a bound on sum(lambda_i - theta_i), i <= rank: what the best vectors hold beyond the first ones of V.

    theta = `values`, X = `residuals` = G V - V Theta. It holds if G has no eigenvalue above mu < theta_rank across V:
    eliminating what is across from G - lambda_i and counting signs (Haynsworth), lambda_i is at most the i-th
    eigenvalue of Theta + X^T X / (theta_rank - mu).
    """
    gap = float(values[rank - 1]) - mu
    if not gap > 0:
        return math.inf
    upper = torch.linalg.eigvalsh(torch.diag(values) + residuals.T @ residuals / gap)
    return float(_last(upper, rank).sum() - values[:rank].sum())


def _is_below(G: Tensor, values: Tensor, V: Tensor, mu: float) -> bool:
    """Return whether G has no eigenvalue above mu across V: then mu - G + V Theta V^T has a Cholesky factor."""
    rest = torch.addmm(G, (V * values).to(G.dtype), V.T.to(G.dtype), beta=-1)
    rest.diagonal().add_(mu)
    return int(torch.linalg.cholesky_ex(rest).info) == 0


def _filter(G: Tensor, V: Tensor, values: Tensor, degree: int) -> Tensor:
    """Return T_m(2 G / cut - 1) V, cut = values[-1]: what lies below `cut` stays within 1.

    m is `degree`, or less where what lies highest would outgrow the dtype's digits.
    """
    top, epsilon = float(values[0]), torch.finfo(G.dtype).eps
    cut = max(float(values[-1]), epsilon * top)
    steps = math.acosh(0.1 / epsilon) / math.acosh(max(2 * top / cut - 1, 1.001))
    before, now = V, torch.addmm(V, G, V, beta=-1, alpha=2 / cut)
    for _ in range(min(degree, int(steps)) - 1):
        before, now = now, torch.addmm(before, G, now, beta=-1, alpha=4 / cut).sub_(now, alpha=2)
    return now


def _ritz(G: Tensor, V: Tensor, N: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return G's Ritz values on the span of V, descending, their orthonormal vectors, and the residuals.

    With N the values are those of N^T N in float64. Residuals have G's digits: a bound takes their squares.
    """
    Q = torch.linalg.qr(V if N is None else V.double()).Q
    Z = (G @ Q.to(G.dtype)).to(Q.dtype)
    H = Q.T @ Z
    if N is not None:
        H = torch.zeros_like(H)
        for start in range(0, len(N), 1024):  # no float64 copy of all N
            Y = N[start : start + 1024].double() @ Q
            H.addmm_(Y.T, Y)
    values, turn = torch.linalg.eigh(H)
    values, turn = values.flip(0), turn.flip(1)
    V = Q @ turn
    return values, V, Z @ turn - V * values


def _gram(N: Tensor, dtype: torch.dtype) -> Tensor:
    """Return N^T N: four panels of the lower half, and their mirror images."""
    N, n = N.to(dtype), N.shape[1]
    G = torch.empty(n, n, dtype=dtype, device=N.device)
    for start in range(0, n, step := max(256, n // 4)):
        panel, below = slice(start, start + step), slice(start + step, n)
        G[start:, panel] = N[:, start:].T @ N[:, panel]
        G[panel, below] = G[below, panel].T
    return G


def _last(ascending: Tensor, count: int) -> Tensor:
    """Return the last `count` entries or columns, or all there are, in reverse."""
    return ascending[..., -count:].flip(-1)
