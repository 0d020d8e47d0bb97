"""The number format of updates: as they are, bfloat16, or int8 with error feedback.

A narrow format carries the change from what was handed out, which both ends know, and not the value: what is lost is a
share of the change. With int8, what was lost is added to the client's next change (error feedback):

    client:  v = y - x + e,   sends Q(v),   keeps e = v - Q(v)          server:  y = x + Q(v)

so the sum of what was sent stays within one rounding of the sum of what was meant. That needs numbers that mean the
same in every round, so methods whose factors change coordinates go without it, as does a tensor whose shape changed.

Downwards there is nothing to feed back: assignments carry values, and the server adds each client's change to its own,
exact ones, so that what a client was handed less exactly never enters the state.

Source: Seide et al. 2014, 1-bit SGD; Karimireddy et al., arXiv:1901.09847, Algorithm 2 (EF-SGD).
"""

from dataclasses import replace

from torch import Tensor

from sheepfold.transforms.base import Parcel, Transform
from sheepfold.wire.dtypes import narrowed, shrinks, widened

KEPT = "wire/"
"""In a client's store, before a tensor's name: what its last update lost."""


def wire_dtype(feedback: bool = True) -> Transform:
    """Return the transform; feedback: whether int8 carries its errors on to the next round."""

    def client(parcel: Parcel) -> Parcel:
        if parcel.wire == "fp32":
            return parcel
        sent: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        for name, tensor in sorted(parcel.tensors.items()):
            if not shrinks(tensor.dtype, parcel.wire):
                sent[name] = tensor
                continue
            meant = change(parcel, name)
            lost = parcel.own.get(KEPT + name)
            feeds = feedback and parcel.wire == "int8"
            if feeds and lost is not None and lost.shape == meant.shape:
                meant = meant + lost.double()
            parts = narrowed({name: meant.float()}, parcel.wire)
            sent |= parts
            if feeds:
                own[KEPT + name] = (meant - widened(parts, parcel.wire)[name].double()).float()
        return replace(parcel, tensors=sent, own=own)

    def server(parcel: Parcel) -> Parcel:
        if parcel.wire == "fp32":
            return replace(parcel, tensors={n: _moved(parcel, n, t) for n, t in parcel.tensors.items()})
        arrived = widened(parcel.tensors, parcel.wire)
        return replace(parcel, tensors={n: _added(parcel, n, t) for n, t in arrived.items()})

    return Transform(name="wire dtype", client=client, server=server)


def change(parcel: Parcel, name: str) -> Tensor:
    """Return what a tensor of a parcel has changed by, in float64; itself, where nothing was handed out."""
    value = parcel.tensors[name].detach().cpu().double()
    start = parcel.start.get(name)
    return value if start is None else value - start.double()


def _moved(parcel: Parcel, name: str, value: Tensor) -> Tensor:
    """Return a value as if the client had begun at the server's own numbers."""
    start, seen = parcel.start.get(name), parcel.seen.get(name)
    if start is None or seen is None or start is seen:
        return value
    return (start.double() + (value.double() - seen.double())).to(value.dtype)


def _added(parcel: Parcel, name: str, change: Tensor) -> Tensor:
    start = parcel.start.get(name)
    if start is None or not start.is_floating_point():
        return change
    return (start.double() + change.double()).to(start.dtype)
