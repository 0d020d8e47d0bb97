"""Many adapters on one frozen base: each adapted layer adds its own client's change to every row of a batch.

    y_row = base(x_row) + s_k B_k A_k dropout(x_row),   k = client of the row

A change is a chain of matrices that a row goes through: A and B; A, core and B; or one sparse matrix. The matrices of
all clients lie stacked, A (K, r, d_in) and B (K, d_out, r). A batch holds rows of any clients in any order; `index`
(rows,) says whose each row is, and batched matmuls do the rest (Punica's idea, arXiv:2310.18547, written for training).
Clients of a smaller rank are padded with zeros, which get zero gradients and stay zero.

Layers that are trained whole, such as a classifier's head, have a weight and a bias of each client's own instead,
stacked in the same flat tensor.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheepfold.adapter import Adapter, kind
from sheepfold.engines.dropout import RowKeys, dropout
from sheepfold.errors import AdapterMismatch, ModelError

# The gradients are strided as their views are, on purpose: one flat gradient for all layers.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

Shape = tuple[int, ...]


@dataclass(slots=True)
class Stack:
    """K adapters: what trains in one flat tensor (K, numbers), with a leaf view of it for every factor.

    The views are what autograd sees; their gradients are views of one flat gradient. So norms, the optimizer step and
    zeroing are single operations on (K, numbers), however many layers are adapted.
    """

    flat: Tensor
    """(K, numbers), in float32 or float64; its .grad is the flat gradient"""
    adapters: Sequence[Adapter]
    """What was stacked"""
    shapes: Mapping[str, Shape]
    """What trains, by flat name, in the order of `flat`: the widest client's shape"""
    fixed: Mapping[str, Tensor]
    """What does not train, (K, ...), or (1, ...) where all clients share it"""
    scales: Tensor
    """(K, sites): alpha / r of each client at each site; (1, sites) where all clients have the same"""
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    """flat name -> (K, ...), views of `flat`"""

    def __post_init__(self) -> None:
        self.trained = self.views(self.flat)
        if self.flat.grad is not None:
            grads = self.views(self.flat.grad)
            self.trained = {name: view.detach().requires_grad_() for name, view in self.trained.items()}
            for name, view in self.trained.items():
                view.grad = grads[name]

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def sites(self) -> list[str]:
        """The adapted modules, sorted."""
        return sorted({*self.adapters[0].pairs, *self.adapters[0].sparse})

    def ranks(self) -> dict[str, Tensor]:
        """Return each client's own rank at each site, (K,)."""
        paths = self.adapters[0].pairs
        return {p: torch.tensor([a.pairs[p].rank for a in self.adapters], device=self.flat.device) for p in paths}

    def chain(self, site: str, position: int) -> list[Tensor]:
        """Return the matrices that a row goes through, (K or 1, out, in) each; scaled in the last one."""
        factors = {name: self.trained.get(f"{site}/{name}", self.fixed.get(f"{site}/{name}")) for name in _KINDS}
        if factors["values"] is not None:
            d_out, d_in = self.adapters[0].sparse[site].shape
            dense = factors["values"].new_zeros(len(factors["values"]), d_out * d_in)
            dense = dense.index_copy(1, self.fixed[f"{site}/positions"], factors["values"])
            return [dense.view(-1, d_out, d_in)]
        chain = [f for f in (factors["A"], factors["core"], factors["B"]) if f is not None]
        # scaled before it is narrowed: alpha / r itself may have no exact half-precision number
        scaled = 1 if factors["core"] is not None else -1  # the small one, where there is one
        chain[scaled] = chain[scaled] * self.scales[:, position].to(chain[scaled].dtype)[:, None, None]
        return chain

    def whole(self, name: str) -> Tensor | None:
        """Return a tensor that is trained whole, (K or 1, ...); None where these adapters do not have it."""
        return self.trained.get(f"{name}/extra", self.fixed.get(f"{name}/extra"))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return (K, numbers) as flat name -> (K, ...)."""
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + _size(shape)
            parts[name], start = flat[:, start:end].view(len(flat), *shape), end
        return parts

    def packed(self, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return each client's tensors as (K, numbers), zeros where it has none; the inverse of `unpacked`."""
        flat = torch.zeros_like(self.flat)
        views = self.views(flat)
        for k, tensors in enumerate(rows):
            for name, tensor in tensors.items():
                views[name][k][_corner(tensor.shape)] = tensor.to(flat)
        return flat

    def unpacked(self, flat: Tensor, k: int) -> dict[str, Tensor]:
        """Return client k's row of (K, numbers) as tensors of its own shapes, copied to the CPU."""
        own, views = self.adapters[k].tensors(), self.views(flat)
        # a tensor of its own: a view would keep the whole cohort alive
        return {name: view[k][_corner(own[name].shape)].detach().cpu().clone() for name, view in views.items()}

    def adapter(self, k: int) -> Adapter:
        """Return a copy of client k's adapter on the CPU, at its own rank."""
        return self.adapters[k].holding(self.unpacked(self.flat, k))

    def first(self, k: int, *, grad: bool = True) -> "Stack":
        """Return the first k clients' numbers as a stack of their own."""
        flat = self.flat.detach()[:k].clone()
        flat.grad = torch.zeros_like(flat) if grad else None
        fixed = {n: t if kind(n) == "positions" else t[:k] for n, t in self.fixed.items()}
        return Stack(flat, self.adapters[:k], self.shapes, fixed, self.scales[:k])


_KINDS = ("A", "B", "core", "values")


def stacked(
    adapters: Sequence[Adapter],
    device: str | torch.device,
    *,
    grad: bool,
    frozen: Collection[str] = (),
    whole: Collection[str] = (),
) -> Stack:
    """Return K adapters as one stack, smaller ranks padded with zeros; `frozen` kinds of tensors do not train.

    whole: the tensors that the model takes whole (see CohortModel). Raises AdapterMismatch where the adapters adapt
    different modules, or carry other whole tensors, which only peft_model trains.
    """
    tensors = [adapter.tensors() for adapter in adapters]
    names = tensors[0].keys()
    for adapter, own in zip(adapters, tensors, strict=True):
        if odd := sorted(adapter.extra.keys() - set(whole)):
            raise AdapterMismatch(f"{odd[0]}: whole tensors are trained by train.engine peft_model")
        if own.keys() != names:
            apart = sorted(own.keys() ^ names)[0].rpartition("/")[0]
            raise AdapterMismatch(f"{apart}: adapted by some clients only; the cohort engine needs one set of modules")
    first = next(t for t in tensors[0].values() if t.is_floating_point())
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    shapes: dict[str, Shape] = {}
    fixed: dict[str, Tensor] = {}
    for name in names:
        held = [own[name] for own in tensors]
        if kind(name) == "positions":
            if any(t is not held[0] and not torch.equal(t, held[0]) for t in held):
                raise AdapterMismatch(f"{name}: clients change different positions; the cohort engine needs one mask")
            fixed[name] = held[0].to(device)
        elif kind(name) in frozen:
            shared = held[:1] if all(t is held[0] for t in held) else held
            fixed[name] = _padded(shared).to(device, dtype)
        else:
            shapes[name] = _widest(held)
    rows = [torch.cat([_pad(own[name], shape).reshape(-1) for name, shape in shapes.items()]) for own in tensors]
    sites = sorted({*adapters[0].pairs, *adapters[0].sparse})
    scales = torch.tensor([[_scale(a, site) for site in sites] for a in adapters], dtype=torch.float64)
    if bool((scales == scales[:1]).all()):
        scales = scales[:1]
    flat = torch.stack(rows).to(device=device, dtype=dtype)
    flat.grad = torch.zeros_like(flat) if grad else None
    return Stack(flat, adapters, shapes, fixed, scales.to(device))


def _scale(adapter: Adapter, site: str) -> float:
    return adapter.pairs[site].scale if site in adapter.pairs else 1.0


def _widest(tensors: Sequence[Tensor]) -> Shape:
    return tuple(max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True))


def _pad(tensor: Tensor, shape: Shape) -> Tensor:
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[_corner(tensor.shape)] = tensor
    return padded


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([_pad(t, _widest(tensors)) for t in tensors])


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def chains(side: Adapter, device: torch.device, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Return a frozen change of the base as chains of plain matrices by site: A and B, or one dense where smaller."""
    made: dict[str, list[Tensor]] = {}
    for site, pair in side.plain().pairs.items():
        (r, d_in), d_out = pair.A.shape, pair.B.shape[0]
        wide = [pair.delta()] if r * (d_in + d_out) >= d_in * d_out else [pair.A, pair.B.double() * pair.scale]
        made[site] = [m.to(device=device, dtype=dtype) for m in wide]
    return made


@dataclass(slots=True)
class Selection:
    """Which adapters are on, and whose row each row of the coming batch is."""

    stack: Stack
    index: Tensor
    """(rows,) int64 into the stack; not looked at where the stack holds one client"""
    dropout: float = 0.0
    keys: RowKeys | None = None
    """Where this batch's dropout draws come from; needed where dropout > 0"""
    side: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """What the base has changed by, for every row alike (see `chains`)"""


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
        if self.name in selection.side:
            change = x
            for matrix in selection.side[self.name]:
                change = F.linear(change, matrix)
            y = y + change
        return y + self._term(x, selection).view_as(y)

    def _term(self, x: Tensor, selection: Selection) -> Tensor:
        chain = selection.stack.chain(self.name, self.order)
        if selection.keys is not None and len(chain) > 1:  # LoRA's dropout; a weight's own change has none
            x = dropout(x, selection.dropout, selection.keys, self.order)
        index = selection.index
        through = _through if len(chain) > 1 else _one_by_one  # a weight's own change is as large as the weight
        if (x.dim() == 2 or len(index) != len(x)) and len(selection.stack) > 1:
            x = x.view(len(index), -1, x.shape[-1])  # beams, families that flatten rows and tokens, pooled rows
        for matrices in chain:
            x = through(x, matrices.to(x.dtype), index)
        return x


class WholeSite(nn.Module):
    """A layer that every client has for itself: linear, or a norm, in the stack's own precision."""

    def __init__(self, layer: nn.Linear | nn.LayerNorm, name: str, switch: "CohortModel") -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self._switch = [switch]

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., d_in) -> (rows, ..., d_out)"""
        selection = self._switch[0].selection
        weight = None if selection is None else selection.stack.whole(f"{self.name}.weight")
        if selection is None or weight is None:
            y: Tensor = self.layer(x)
            return y
        bias, index = selection.stack.whole(f"{self.name}.bias"), selection.index
        rows = x.to(weight.dtype).view(len(x), -1, x.shape[-1])
        if isinstance(self.layer, nn.Linear):
            through = _through if weight[0].numel() <= FEW_NUMBERS else _one_by_one
            rows = through(rows, weight, index)
        else:
            rows = F.layer_norm(rows, self.layer.normalized_shape, eps=self.layer.eps)
            rows = rows * _of_each(weight, index)
        if bias is not None:
            rows = rows + _of_each(bias, index)
        return rows.view(*x.shape[:-1], rows.shape[-1])


FEW_NUMBERS = 1 << 14
"""A weight up to this size is copied for every row; larger ones are taken client after client."""


def _of_each(vectors: Tensor, index: Tensor) -> Tensor:
    """Return each row's own vector, (K, d) -> (rows or 1, 1, d)."""
    return (vectors if len(vectors) == 1 else _each_row(vectors, index))[:, None]


def _through(x: Tensor, matrices: Tensor, index: Tensor) -> Tensor:
    """Return each row of x through its client's matrix, or through the one that all share."""
    if len(matrices) == 1:
        return F.linear(x, matrices[0])
    return torch.bmm(x, _each_row(matrices, index).transpose(1, 2))


def _one_by_one(x: Tensor, matrices: Tensor, index: Tensor) -> Tensor:
    """Return what `_through` does, client after client: no row gets a copy of its client's matrix."""
    if len(matrices) == 1:
        return F.linear(x, matrices[0])
    order = torch.argsort(index, stable=True)
    parts = torch.split(x[order], torch.bincount(index, minlength=len(matrices)).tolist())
    done = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)])
    return done[torch.argsort(order)]


class CohortModel:
    """A frozen base whose adapted layers can carry any number of adapters at once."""

    def __init__(self, model: Any, sites: Mapping[str, nn.Module], whole: Collection[str] = ()) -> None:
        """Put a Site in the place of every layer in `sites`; `close` puts the layers back. Raises ModelError.

        whole: the names of tensors that clients have whole; their layers are replaced too.
        """
        if not sites:
            raise ModelError("no layer to adapt: adapter.targets matched nothing")
        head = model.get_output_embeddings()
        if odd := [name for name, layer in sites.items() if layer is head and head is not None]:
            raise ModelError(
                f"{odd[0]}: the output head; the cohort engine computes it at targets alone and does not adapt "
                "it: leave it out of adapter.targets, or use train.engine peft_model"
            )
        self.model = model
        self.layers = dict(sites)
        self.whole = tuple(whole)
        self.selection: Selection | None = None
        for order, name in enumerate(sorted(sites)):
            _replace(model, name, Site(sites[name], name, order, self))
        for name in sorted({tensor.rpartition(".")[0] for tensor in whole}):
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear | nn.LayerNorm):
                raise ModelError(
                    f"{name}: a {type(layer).__name__}, and the cohort engine trains linear layers and norms whole; "
                    "use train.engine peft_model"
                )
            self.layers[name] = layer
            _replace(model, name, WholeSite(layer, name, self))

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
