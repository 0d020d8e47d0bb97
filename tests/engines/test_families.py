"""Every family that the cohort engine takes: equal to plain PEFT, one client at a time, on ragged rows, in float64."""

import pytest
import torch

from sheepfold.config import TrainSettings
from tests import small

TRAIN = TrainSettings(epochs=1, batch_rows=4, micro_rows=2, lr=1e-3)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_cohort_equals_plain_peft_in_every_family(family):
    base = small.model(torch.float64, family)
    ranks = (2, 4, 8, 4)
    start = {c: small.adapter(base, r, i, family) for i, (c, r) in enumerate(zip(small.CLIENTS, ranks, strict=True))}
    work = small.assignments(start)
    with small.Whole():
        engine = small.cohort_engine(base, TRAIN, family)
        ours = {a.client: a for a in engine.train(work)}
        engine.close()
        reference = {a.client: a for a in small.peft_engine(base, TRAIN, family).train(work)}
    assert max(small.gap(ours[c].adapter, reference[c].adapter) for c in start) < 1e-10
    assert min(small.gap(ours[c].adapter, start[c]) for c in start) > 1e-4, "training must change the adapters"
