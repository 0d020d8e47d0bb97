"""A bound on the L2 norm of a whole update: all it changes, and what it sends beside that, as one vector.

    client:  d -> d min(1, bound / ||d||)          server:  the same, and nobody's is believed who is far beyond

A client that keeps the bound can arrive beyond it by what its number format rounds, at most `SLACK` of it; that much is
scaled back. What folds is never longer than the bound.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sheepfold.errors import WireError
from sheepfold.transforms.base import Parcel, Transform
from sheepfold.transforms.wire_dtype import change

SLACK = {"fp32": 1e-3, "bf16": 1e-2, "int8": 1.0}
"""Share of the bound by which rounding may exceed it; of int8, a row's largest number and the feedback count."""


def norm_bound(bound: float) -> Transform:
    """Return the transform that holds every update's L2 norm at `bound` or below, in the adapter's own unit."""

    def client(parcel: Parcel) -> Parcel:
        return _scaled(parcel, bound, norm(parcel))

    def server(parcel: Parcel) -> Parcel:
        found = norm(parcel)
        if not found <= bound * (1 + SLACK[parcel.wire]):
            raise WireError(
                f"the norm of its change is {found:.4g}, expected at most {bound:g} (federation.norm_bound)"
            )
        return _scaled(parcel, bound, found)

    return Transform(name="norm bound", client=client, server=server)


def norm(parcel: Parcel) -> float:
    """Return the L2 norm of all that a parcel changes, in float64."""
    squares = [change(parcel, n).square().sum() for n, t in sorted(parcel.tensors.items()) if t.is_floating_point()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _scaled(parcel: Parcel, bound: float, found: float) -> Parcel:
    if found <= bound * (1 + 1e-6):
        return parcel
    return replace(parcel, tensors={n: _shorter(parcel, n, t, bound / found) for n, t in parcel.tensors.items()})


def _shorter(parcel: Parcel, name: str, value: Tensor, by: float) -> Tensor:
    if not value.is_floating_point():
        return value
    start = parcel.start.get(name)
    short = change(parcel, name) * by
    return (short if start is None else start.double() + short).to(value.dtype)
