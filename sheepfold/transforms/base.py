"""A transform is one thing done to an update on its way, written as its two ends.

    client:  trained ─▶ first ─▶ second ─▶ ... ─▶ last ─▶ bytes
    server:  folded  ◀─ first ◀─ second ◀─ ... ◀─ last ◀─ bytes

The client's sides run in order, the server's in reverse. A bound comes before what is added to what it bounded, and the
number format last. Both sides are functions of a parcel, so what a client must remember is in the parcel too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sheepfold.wire.dtypes import Format

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Parcel:
    """An update between training and fold."""

    client: str
    round: int
    wire: Format
    """The number format that the server asked for."""
    tensors: Tensors
    """What is sent: 'adapter:layers.0.q_proj/A' and 'memory:...'; values, not changes"""
    start: Tensors
    """What changes are counted from, for tensors of the adapter: what was handed out, as this end has it"""
    seen: Tensors
    """The same as the client saw it; another one than `start` at the server, where assignments travel narrowed"""
    own: Tensors = field(default_factory=dict)
    """What the client remembers from its last parcel, and then for its next; empty at the server"""


Side = Callable[[Parcel], Parcel]


def leave(parcel: Parcel) -> Parcel:
    """Return the parcel."""
    return parcel


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """One thing done to an update on its way. Either side may raise WireError: the update then counts as absent."""

    name: str
    client: Side = leave
    server: Side = leave


def outbound(transforms: Sequence[Transform], parcel: Parcel) -> Parcel:
    """Return a parcel after the client's sides."""
    for transform in transforms:
        parcel = transform.client(parcel)
    return parcel


def inbound(transforms: Sequence[Transform], parcel: Parcel) -> Parcel:
    """Return a parcel after the server's sides."""
    for transform in reversed(transforms):
        parcel = transform.server(parcel)
    return parcel
