"""Plugging: what was learned on an emulator gets the full model's names, one by one and never by order.

model.layers.3.self_attn.q_proj/A   ──▶   model.layers.30.self_attn.q_proj/A
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from sheepfold.adapter import Adapter
from sheepfold.errors import AdapterMismatch
from sheepfold.offsite.cut import Cut

T = TypeVar("T")


def plug(adapter: Adapter, cut: Cut, known: Collection[str] | None = None) -> Adapter:
    """Return an emulator's adapter under the full model's names.

    known: names of the full model's modules and tensors, where they are at hand. Raises AdapterMismatch for a name that
    has no place there: a layer of the emulator's middle, or one that the full model does not have.
    """

    def moved(values: Mapping[str, T]) -> dict[str, T]:
        return {_named(name, cut, known): value for name, value in values.items()}

    return Adapter(moved(adapter.pairs), moved(adapter.extra), moved(adapter.sparse))


def _named(name: str, cut: Cut, known: Collection[str] | None) -> str:
    place = cut.plugged(name)
    if place is None:
        raise AdapterMismatch(
            f"{name}: has no place in the full model: of the emulator's layers, {list(cut.adapter_layers)} are adapter "
            "layers, and the others stand for its middle"
        )
    if known is not None and place not in known:
        raise AdapterMismatch(f"{name}: the full model has no {place}; is this the model that the emulator stands for?")
    return place
