"""Whose each row of a batch is, and products of every row with its own client's matrix.

    through   y_row = x_row M_kᵀ,            k = client of the row
    outer     G_k = sum over its rows of g_rowᵀ x_row, a matrix's gradient

A batch lies in one of two ways. `Rows`: (rows, tokens, d), any client's rows in any order, short ones padded. `Packed`:
(1, tokens, d), rows end to end without padding, client after client. Either way K clients cost a handful of kernels.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16
"""Bytes that every row of a grouped product's matrices has to be a multiple of, on CUDA"""
GROUPING = (9, 10)
"""Compute capabilities, before the dot, whose grouped product leaves the host alone; others' waits for the sizes"""


class Owners(Protocol):
    """Whose the rows of a batch are."""

    def through(self, x: Tensor, matrices: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return onto + x through each row's own matrix; matrices: (K, out, in), or (1, out, in) that all share."""

    def outer(self, grad: Tensor, x: Tensor, clients: int) -> Tensor:
        """Return the gradient of the matrices that gave `grad` at their output, (clients, out, in)."""

    def spread(self, numbers: float | Tensor) -> float | Tensor:
        """Return one number a client, (K,), so that it multiplies the client's rows; one for all as it is."""

    def rows(self, x: Tensor) -> Tensor:
        """Return a layer's input as the batch lies: (rows, tokens, d), also where a family has flattened it."""


class Rows:
    """(rows, tokens, d): `index` says whose each row is."""

    def __init__(self, index: Tensor) -> None:
        """index: (rows,) int64."""
        self.index = index

    def rows(self, x: Tensor) -> Tensor:
        """See Owners; beams and pooled rows have one vector each."""
        rows = self.index.shape[0]
        return x if x.dim() == 3 and x.shape[0] == rows else x.reshape(rows, -1, x.shape[-1])

    def spread(self, numbers: float | Tensor) -> float | Tensor:
        """See Owners."""
        return numbers if isinstance(numbers, float) else numbers[self.index][:, None, None]

    def through(self, x: Tensor, matrices: Tensor, onto: Tensor | None = None) -> Tensor:
        """See Owners."""
        if matrices.shape[0] == 1:
            return _shared(x, matrices[0], onto)
        own = matrices.index_select(0, self.index)
        if onto is not None:
            return torch.baddbmm(onto, x, own.transpose(1, 2))
        return _narrow_first(own, x.transpose(1, 2))

    def outer(self, grad: Tensor, x: Tensor, clients: int) -> Tensor:
        """See Owners. One-hot products would let one client's overflow (0 * inf) reach the others."""
        if clients == 1:
            return _outer(grad, x)
        if grad.shape[-1] > x.shape[-1]:
            return self.outer(x, grad, clients).transpose(1, 2)
        return summed(torch.bmm(grad.transpose(1, 2), x), self.index, clients)


class Packed:
    """(1, tokens, d): each client's tokens follow one another."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """sizes: tokens of each client; a client may have none."""
        self.sizes = list(sizes)
        self.tokens = sum(sizes)
        ends = torch.tensor(sizes).cumsum(0)
        self.ends = ends.to(device=device, dtype=torch.int32, non_blocking=True)
        self.idle = (ends.diff(prepend=ends.new_zeros(1)) == 0).to(device=device, non_blocking=True)

    def rows(self, x: Tensor) -> Tensor:
        """See Owners."""
        return x.view(1, -1, x.shape[-1])

    def spread(self, numbers: float | Tensor) -> float | Tensor:
        """See Owners."""
        if isinstance(numbers, float):
            return numbers
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1)).long()
        return torch.repeat_interleave(numbers, sizes, output_size=self.tokens)[:, None]

    def through(self, x: Tensor, matrices: Tensor, onto: Tensor | None = None) -> Tensor:
        """See Owners."""
        if matrices.shape[0] == 1:
            return _shared(x, matrices[0], onto)
        if _may_group(x, *matrices.shape[1:]):
            done = F.grouped_mm(x[0].contiguous(), matrices.transpose(1, 2), offs=self.ends)
        else:
            parts = zip(torch.split(x[0], self.sizes), matrices, strict=True)
            done = torch.cat([F.linear(part, matrix) for part, matrix in parts])
        return done[None] if onto is None else onto + done

    def outer(self, grad: Tensor, x: Tensor, clients: int) -> Tensor:
        """See Owners."""
        if clients == 1:
            return _outer(grad, x)
        if _may_group(x, grad.shape[-1], x.shape[-1]):
            made = F.grouped_mm(grad[0].contiguous().T, x[0].contiguous(), offs=self.ends)
            return made.masked_fill(self.idle[:, None, None], 0)  # some GPUs leave clients without tokens unwritten
        parts = zip(torch.split(grad[0], self.sizes), torch.split(x[0], self.sizes), strict=True)
        return torch.stack([g.T @ part for g, part in parts])


def summed(rows: Tensor, index: Tensor, clients: int) -> Tensor:
    """Return the sum of each client's rows in float32 or wider, (rows, ...) -> (clients, ...), always in one order."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = rows.new_zeros(clients, *rows.shape[1:])
    if rows.is_cuda:  # index_add_ has no order there
        return total.index_put_((index,), rows, accumulate=True)
    width = total[0].numel()
    return total.view(clients, width).index_add_(0, index, rows.view(rows.shape[0], width)).view_as(total)


def _shared(x: Tensor, matrix: Tensor, onto: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if onto is not None:
        return torch.addmm(onto.reshape(-1, onto.shape[-1]), flat, matrix.T).view_as(onto)
    return _narrow_first(matrix, flat.T).view(*x.shape[:-1], matrix.shape[0])


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    if grad.shape[-1] > x.shape[-1]:
        return _outer(x, grad).transpose(1, 2)
    return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]))[None]


def _narrow_first(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return (matrix @ columns)ᵀ, on a CPU stored by columns where it is narrow: with the few rows of an adapter's rank
    its products take half as long that way round."""
    if not columns.is_cuda and matrix.shape[-2] < matrix.shape[-1]:
        return (matrix @ columns).mT
    return columns.mT @ matrix.mT


def _may_group(x: Tensor, *sizes: int) -> bool:
    """Return whether a grouped product takes these: bfloat16, rows of whole 16 bytes, and a GPU that has one."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    major, _ = torch.cuda.get_device_capability(x.device)
    return major in GROUPING and all(size * x.element_size() % ALIGNED == 0 for size in sizes)


class _Through(torch.autograd.Function):
    """onto + each row of x through its own matrices, one after the other, narrowed to the dtype of x on the way.

    One node for a whole chain. Autograd's own way through index_select and bmm keeps a copy of each row's matrices and
    adds up their gradients in a general scatter, eight times as slow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, onto: Tensor | None, owners: Owners, scale: float | Tensor | None, *chain: Tensor
    ) -> Tensor:
        inputs = [x]
        for matrices in chain[:-1]:
            x = owners.through(x, matrices.to(x.dtype))
            if scale is not None and len(inputs) == 1:
                x = x.mul_(scale)
            inputs.append(x)
        ctx.save_for_backward(*inputs, *chain)
        ctx.owners, ctx.scale = owners, scale
        return owners.through(x, chain[-1].to(x.dtype), onto)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        owners: Owners = ctx.owners
        for_x, for_onto, _, _, *for_chain = ctx.needs_input_grad
        saved = ctx.saved_tensors  # once: recomputed activations are unpacked a single time
        inputs, chain = saved[: len(for_chain)], saved[len(for_chain) :]
        onto = grad if for_onto else None
        back: list[Tensor | None] = [None] * len(chain)
        for i in reversed(range(len(chain))):
            if i == 0 and len(chain) > 1 and ctx.scale is not None:
                grad = (grad * ctx.scale).to(grad.dtype)
            if for_chain[i]:
                back[i] = owners.outer(grad, inputs[i], chain[i].shape[0]).to(chain[i].dtype)
            if i or for_x:
                grad = owners.through(grad, chain[i].to(grad.dtype).transpose(1, 2))
        return grad if for_x else None, onto, None, None, *back


def through(
    x: Tensor,
    chain: Sequence[Tensor],
    owners: Owners,
    *,
    onto: Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Return each row of x through its own matrices, (K, ..) or shared (1, ..), on top of `onto`; see Owners.

    scale: a factor for each row as `spread` gives it, where a chain has two matrices or more; it multiplies after the
    first, where the rank is and rows are short, and is not rounded to half precision as the matrices are.
    """
    if all(matrices.shape[0] == 1 for matrices in chain) and not isinstance(scale, Tensor):
        return _alike(x, chain, onto, scale)
    done: Tensor = _Through.apply(x, onto, owners, scale, *chain)  # type: ignore[no-untyped-call]
    return done


def _alike(x: Tensor, chain: Sequence[Tensor], onto: Tensor | None, scale: float | None) -> Tensor:
    """Return all rows of x through the same matrices. Autograd's own nodes are plain products here, and cost a small
    layer less than one that is written in Python."""
    *firsts, last = (matrices.squeeze(0).to(x.dtype) for matrices in chain)
    rows = x.reshape(-1, x.shape[-1])
    for place, matrix in enumerate(firsts):
        rows = _narrow_first(matrix, rows.T)
        if scale is not None and place == 0:
            rows = rows * scale
    if onto is not None:
        return torch.addmm(onto.reshape(-1, onto.shape[-1]), rows, last.T).view_as(onto)
    return _narrow_first(last, rows.T).view(*x.shape[:-1], last.shape[0])
