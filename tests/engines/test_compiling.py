"""torch.compile changes no result, compiles a bounded number of versions, and lets go of the model."""

import pytest
import torch
import torch._dynamo

from sheepfold.config import TrainSettings
from sheepfold.engines.compiling import Compiled
from tests import small

RANKS = {"ann": 4, "bob": 4, "cleo": 4, "dora": 4}
RAGGED = TrainSettings(epochs=2, batch_rows=4, micro_rows=2, lr=1e-3)
"""8, 6, 8 and 10 steps: passes of four, three and one client, with batches of every shape."""


def trained(backend: str | None, *, packing: bool = False):
    base = small.model(torch.float32)
    start = {c: small.adapter(base, r, seed, dtype=torch.float32) for seed, (c, r) in enumerate(RANKS.items())}
    engine = small.cohort_engine(base, RAGGED.model_copy(update={"packing": packing}))
    if backend is not None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine.compiled = Compiled(base, backend=backend)
    done = {u.client: u.adapter for u in engine.train(small.assignments(start))}
    assert all(layer._compiled_call_impl is None for layer in base.model.layers)
    engine.close()
    return done


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_compiled_blocks_train_as_plain_ones_do_in_a_handful_of_versions(packing):
    plain, compiled = trained(None, packing=packing), trained("aot_eager", packing=packing)
    assert max(small.gap(plain[c], compiled[c]) for c in plain) < 5e-5
    versions = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= versions <= 4 or packing  # on a CPU packed attention goes row by row, and so is compiled in pieces


@pytest.mark.slow
def test_machine_code_trains_as_plain_blocks_do():
    plain, compiled = trained(None), trained("inductor")
    assert max(small.gap(plain[c], compiled[c]) for c in plain) < 5e-5
