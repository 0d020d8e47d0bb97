"""What a client keeps waits on disk: memory does not grow with the clients that have taken part."""

import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from sheepfold import simulation
from tests import small
from tests.marks import mostly_slow
from tests.runs import experiment

CLIENTS = 40
KEEPING: dict[str, dict[str, Any]] = {
    "scaffold": {"federation.strategy": "scaffold"},
    "fedsa": {"federation.strategy": "fedsa"},
    "ditto": {"personal.ditto": 0.1},
    "keep_local": {"personal.keep_local": ["*.v_proj"]},
    "int8": {"federation.wire": {"up": "int8", "down": "int8"}},
    "own ranks": {"federation.strategy": "flexlora", "adapter": {"ranks": list(range(1, 13))}},
}
"""What makes clients keep something, or an engine something for them."""

TRACED = (FakeTensor, FunctionalTensor)
"""Stand-ins without memory that torch.compile keeps in its caches, where an earlier test of the process compiled."""


def living() -> int:
    """Return the bytes of all tensors that anything still holds, on whatever device."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, TRACED) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.saved(tmp_path_factory.mktemp("bases") / "base")


@pytest.mark.parametrize("engine", ["cohort", "peft_model"])
@pytest.mark.parametrize("keeps", mostly_slow(KEEPING, quick=["scaffold"]))
def test_memory_is_the_same_after_a_few_clients_and_after_most(tmp_path, folder, engine, keeps):
    after: list[int] = []
    seen: set[str] = set()
    seen_by: list[int] = []

    def listener(event: str, facts: Any) -> None:
        if event == "round" and facts["round"]:
            seen.update(facts["cohort"])
            if facts["round"] in (2, 6):
                after.append(living())
                seen_by.append(len(seen))

    asked = {
        "model.base": str(folder),
        "train": {"steps": 1, "batch_rows": 2, "engine": engine},
        "data": {"rows": 8 * CLIENTS, "max_tokens": 32, "partition": {"clients": CLIENTS}},
        "federation": {"rounds": 6, "clients_per_round": 10},
        "evaluation.every": 0,
    }
    with small.quick():
        simulation.run(experiment(tmp_path, **asked, **KEEPING[keeps]), listener=listener)
    assert seen_by[1] > seen_by[0] + 10, "later rounds must bring new clients"
    client = 4 * (32 + 16) * 2  # the smallest adapter here: rank 1 at two modules or more, in bytes
    assert after[1] - after[0] < client, "grows with the clients seen"
