"""Many adapters on one frozen base: each adapted layer adds its own client's low-rank term to every row of a batch.

    y_row = base(x_row) + s_k B_k A_k dropout(x_row),   k = client of the row

The factors of all clients lie stacked, A (K, r, d_in) and B (K, d_out, r). A batch holds rows of any clients in any
order; `index` (rows,) says whose each row is, and two batched matmuls do the rest (Punica's idea, arXiv:2310.18547,
written for training). Clients of a smaller rank are padded with zeros, which get zero gradients and stay zero.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheepfold.adapter import Adapter, LoraPair, pad
from sheepfold.engines.dropout import RowKeys, dropout
from sheepfold.errors import AdapterMismatch, ModelError

# The gradients are strided as their views are, on purpose: one flat gradient for all layers.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass(slots=True)
class Stack:
    """K adapters in one flat tensor (K, numbers), and a leaf view of it for every A and B.

    The views are what autograd sees; their gradients are views of one flat gradient. So norms, the optimizer step and
    zeroing are single operations on (K, numbers), however many layers are adapted.
    """

    flat: Tensor
    """(K, numbers), in float32 or float64; its .grad is the flat gradient"""
    scales: Tensor
    """(K, sites): alpha / r of each client at each site"""
    sites: Sequence[str]
    A: Mapping[str, Tensor]
    """site -> (K, r, d_in)"""
    B: Mapping[str, Tensor]
    """site -> (K, d_out, r)"""
    ranks: Sequence[Mapping[str, int]]
    """Each client's own rank at each site, without padding."""

    def __len__(self) -> int:
        return self.flat.shape[0]

    def adapter(self, k: int) -> Adapter:
        """Return a copy of client k's adapter on the CPU, at its own rank."""
        pairs = {}
        for s, name in enumerate(self.sites):
            r = self.ranks[k][name]
            A, B = self.A[name][k, :r].detach(), self.B[name][k, :, :r].detach()
            # a tensor of its own: a view would keep the whole cohort alive
            pairs[name] = LoraPair(A.cpu().clone(), B.cpu().contiguous().clone(), float(self.scales[k, s]))
        return Adapter(pairs)

    def first(self, k: int, *, grad: bool = True) -> "Stack":
        """Return the first k clients' numbers as a stack of their own."""
        shapes = {name: (self.A[name].shape[1:], self.B[name].shape[1:]) for name in self.sites}
        flat = self.flat.detach()[:k].clone()
        return _views(flat, self.scales[:k], self.sites, shapes, self.ranks[:k], grad=grad)


def stacked(adapters: Sequence[Adapter], device: str | torch.device, *, grad: bool) -> Stack:
    """Return K adapters as one stack, smaller ranks padded with zeros.

    Raises AdapterMismatch where they adapt different modules, or carry whole tensors, which only peft_model trains.
    """
    sites = sorted(adapters[0].pairs)
    for adapter in adapters:
        if sorted(adapter.pairs) != sites:
            odd = sorted(set(adapter.pairs) ^ set(sites))[0]
            raise AdapterMismatch(f"{odd}: adapted by some clients only; the cohort engine needs one set of modules")
        if adapter.extra:
            raise AdapterMismatch(f"{next(iter(adapter.extra))}: whole tensors are trained by train.engine peft_model")
    widest = {name: max(a.pairs[name].rank for a in adapters) for name in sites}
    rows = []
    for adapter in adapters:
        padded = [pad(adapter.pairs[name], widest[name]) for name in sites]
        rows.append(torch.cat([t.reshape(-1) for pair in padded for t in (pair.A, pair.B)]))
    shapes = {n: (p.A.shape, p.B.shape) for n, p in zip(sites, padded, strict=True)}
    dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    scales = torch.tensor([[a.pairs[n].scale for n in sites] for a in adapters], dtype=torch.float64)
    flat = torch.stack(rows).to(device=device, dtype=dtype)
    return _views(flat, scales.to(device), sites, shapes, [a.ranks for a in adapters], grad=grad)


def _views(
    flat: Tensor,
    scales: Tensor,
    sites: Sequence[str],
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    ranks: Sequence[Mapping[str, int]],
    *,
    grad: bool,
) -> Stack:
    flat.grad = torch.zeros_like(flat) if grad else None
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    start = 0
    for name in sites:
        for factors, shape in zip((A, B), shapes[name], strict=True):
            end = start + shape[0] * shape[1]
            view = flat[:, start:end].view(len(flat), *shape)
            if flat.grad is not None:
                view = view.detach().requires_grad_()
                view.grad = flat.grad[:, start:end].view(len(flat), *shape)
            factors[name], start = view, end
    return Stack(flat, scales, sites, A, B, ranks)


@dataclass(slots=True)
class Selection:
    """Which adapters are on, and whose row each row of the coming batch is."""

    stack: Stack
    index: Tensor
    """(rows,) int64 into the stack; not looked at where the stack holds one client"""
    dropout: float = 0.0
    keys: RowKeys | None = None
    """Where this batch's dropout draws come from; needed where dropout > 0"""


class _EachRow(torch.autograd.Function):
    """factors[index]: (K, ...) -> (rows, ...). Its backward adds up the rows of each client, on a CPU in order.

    index_select's own backward spends eight times as long in a general scatter; a matmul with a one-hot matrix would
    let one client's overflow (0 * inf) reach the others.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.clients = factors.shape[0]
        return factors.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.clients, grad[0].numel())
        return total.index_add_(0, index, grad.reshape(len(grad), -1)).view(-1, *grad.shape[1:]), None


def _each_row(factors: Tensor, index: Tensor) -> Tensor:
    rows: Tensor = _EachRow.apply(factors, index)  # type: ignore[no-untyped-call]
    return rows


class Site(nn.Module):
    """One adapted layer: the frozen layer, and each row's own low-rank term."""

    def __init__(self, layer: nn.Module, name: str, order: int, switch: "CohortModel") -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.order = order
        self._switch = [switch]  # in a list, so that torch does not register the model inside itself

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, d_in) -> (rows, tokens, d_out)"""
        y: Tensor = self.layer(x)
        selection = self._switch[0].selection
        if selection is None:
            return y
        return y + self._term(x, selection).view_as(y)

    def _term(self, x: Tensor, selection: Selection) -> Tensor:
        stack, position = selection.stack, self.order
        A, B, scale = stack.A[self.name], stack.B[self.name], stack.scales[:, position]
        # scaled before it is narrowed: alpha / r itself may have no exact half-precision number
        A, B = (A * scale.to(A.dtype)[:, None, None]).to(x.dtype), B.to(x.dtype)
        if selection.keys is not None:
            x = dropout(x, selection.dropout, selection.keys, position)
        if len(stack) == 1:
            return F.linear(F.linear(x, A[0]), B[0])
        index = selection.index
        if len(index) != len(x):
            x = x.view(len(index), -1, x.shape[-1])  # families that flatten rows and tokens
        low = torch.bmm(x, _each_row(A, index).transpose(1, 2))
        return torch.bmm(low, _each_row(B, index).transpose(1, 2))


class CohortModel:
    """A frozen base whose adapted layers can carry any number of adapters at once."""

    def __init__(self, model: Any, sites: Mapping[str, nn.Module]) -> None:
        """Put a Site in the place of every layer in `sites`; `close` puts the layers back. Raises ModelError."""
        if not sites:
            raise ModelError("no layer to adapt: adapter.targets matched nothing")
        head = model.get_output_embeddings()
        if odd := [name for name, layer in sites.items() if layer is head]:
            raise ModelError(
                f"{odd[0]}: the output head; the cohort engine computes it at targets alone and does not adapt "
                "it: leave it out of adapter.targets, or use train.engine peft_model"
            )
        self.model = model
        self.layers = dict(sites)
        self.selection: Selection | None = None
        for order, name in enumerate(sorted(sites)):
            _replace(model, name, Site(sites[name], name, order, self))

    @contextmanager
    def using(self, selection: Selection | None) -> Iterator[None]:
        """Run the base with these adapters; None: the bare base."""
        before, self.selection = self.selection, selection
        try:
            yield
        finally:
            self.selection = before

    def close(self) -> None:
        """Put the base's own layers back."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
