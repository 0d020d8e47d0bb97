"""Plugging goes by name: an order changes nothing, and a name without a place is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair, SparseDelta
from sheepfold.errors import AdapterMismatch
from sheepfold.offsite.cut import Cut
from sheepfold.offsite.plug import plug

CUT = Cut("model.layers", 8, (0, 1, 2, 5, 6, 7), 2, 2, ("layers",))
PLACES = {0: 0, 1: 1, 4: 6, 5: 7}


def pair(number: float) -> LoraPair:
    return LoraPair(torch.full((2, 3), number), torch.full((4, 2), number), 2.0)


ADAPTER = Adapter(
    {f"model.layers.{i}.mlp.up_proj": pair(i) for i in PLACES},
    {f"model.layers.{i}.norm.weight": torch.full((3,), float(i)) for i in PLACES}
    | {"model.norm.weight": torch.ones(3)},
    {f"model.layers.{i}.q": SparseDelta(torch.ones(1) * i, torch.tensor([0]), (2, 2)) for i in PLACES},
)


@given(st.permutations(list(PLACES)))
def test_reordering_changes_nothing(order):
    def turned(values):
        return {name: values[name] for i in order for name in values if f".{i}." in name} | {
            name: value for name, value in values.items() if "layers" not in name
        }

    shuffled = Adapter(turned(ADAPTER.pairs), turned(ADAPTER.extra), turned(ADAPTER.sparse))
    assert plug(shuffled, CUT).hash() == plug(ADAPTER, CUT).hash()


def test_each_layer_goes_to_its_own_place_and_all_else_stays():
    made = plug(ADAPTER, CUT)
    assert {n: float(p.A[0, 0]) for n, p in made.pairs.items()} == {
        f"model.layers.{place}.mlp.up_proj": i for i, place in PLACES.items()
    }
    assert {n: float(t[0]) for n, t in made.extra.items()} == {
        **{f"model.layers.{place}.norm.weight": i for i, place in PLACES.items()},
        "model.norm.weight": 1,
    }
    assert set(made.sparse) == {f"model.layers.{place}.q" for place in PLACES.values()}


@pytest.mark.parametrize("index", [2, 3, 6, 11])
def test_a_layer_of_the_middle_or_beyond_has_no_place(index):
    with pytest.raises(AdapterMismatch, match=rf"layers.{index}.mlp: has no place .* \[0, 1, 4, 5\] are adapter"):
        plug(Adapter({f"model.layers.{index}.mlp": pair(1)}), CUT)


def test_a_name_that_the_full_model_lacks_is_refused():
    with pytest.raises(AdapterMismatch, match=r"layers.4.mlp.gate: the full model has no model.layers.6.mlp.gate"):
        plug(Adapter({"model.layers.4.mlp.gate": pair(1)}), CUT, {"model.layers.6.mlp.up"})
    assert "transformer.layers.2.x" in plug(Adapter({"transformer.layers.2.x": pair(1)}), CUT).pairs, "another list"
