"""K clients' adapters in one flat tensor, with views of it for every factor: what a pass of the cohort engine trains.

Clients of a smaller rank are padded with zeros, which get zero gradients and stay zero.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, kind
from sheepfold.errors import AdapterMismatch

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
    """(K, sites), like `flat`: alpha / r of each client at each site; (1, sites) on the CPU where all have the same"""
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    """flat name -> (K, ...), views of `flat`"""
    alone: bool = False
    """Whether there is one adapter: then it is everybody's. Set from the others"""
    one_scale: list[float] = field(default_factory=list)
    """The scales, where all clients have the same. Set from `scales`"""

    def __post_init__(self) -> None:
        self.alone = len(self) == 1
        self.one_scale = self.scales[0].tolist() if len(self.scales) == 1 else []
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

    def chain(self, site: str) -> list[Tensor]:
        """Return the matrices that a row goes through, (K or 1, out, in) each; the scale is not in them."""
        factors = {name: self.trained.get(f"{site}/{name}", self.fixed.get(f"{site}/{name}")) for name in _KINDS}
        if factors["values"] is not None:
            d_out, d_in = self.adapters[0].sparse[site].shape
            dense = factors["values"].new_zeros(len(factors["values"]), d_out * d_in)
            dense = dense.index_copy(1, self.fixed[f"{site}/positions"], factors["values"])
            return [dense.view(-1, d_out, d_in)]
        return [f for f in (factors["A"], factors["core"], factors["B"]) if f is not None]

    def scale(self, position: int) -> float | Tensor:
        """Return alpha / r at a site, by its place among the sites: one number, or (K,) where clients differ."""
        return self.one_scale[position] if self.one_scale else self.scales[:, position]

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
        """Return the first k clients' numbers, as a stack that goes on in the same memory."""
        flat = self.flat.detach()[:k]  # a view: copies of numbers, gradients and moments were not planned for
        flat.grad = None if not grad or self.flat.grad is None else self.flat.grad[:k]
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
    scales = scales[:1] if bool((scales == scales[:1]).all()) else scales.to(device, dtype)
    flat = torch.stack(rows).to(device=device, dtype=dtype)
    flat.grad = torch.zeros_like(flat) if grad else None
    return Stack(flat, adapters, shapes, fixed, scales)


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
