"""What goes between processes arrives as it was: every bit, every kind of number, and one value for many holders."""

import pickle
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import TrainSettings
from sheepfold.devices.values import from_bytes, to_bytes
from sheepfold.errors import WireError
from sheepfold.messages import Assignment, Wire
from sheepfold.metrics import Mean, Score
from tests import small


def arrived(value):
    return from_bytes(to_bytes(value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5)])
def test_tensors_arrive_to_the_bit(dtype, shape):
    t = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    odd, got = arrived(["a", t, {"b": t.T if t.dim() == 2 else t}])[1:]
    assert odd.dtype == dtype
    assert torch.equal(odd, t)
    assert torch.equal(got["b"], t.T if t.dim() == 2 else t)


def test_a_rounds_assignments_travel_with_one_adapter():
    base = small.model()
    adapter, side = small.with_cores(small.adapter(base, 4, 0)), small.adapter(base, 2, 1)
    handed = [
        Assignment(c, 3, adapter, 1e-3, 7, {"c": adapter.pairs[next(iter(adapter.pairs))].A}, side, frozenset({"A"}),
                   wire=Wire("int8", "bf16"), last=2)
        for c in ("ann", "bob", "cleo")
    ]  # fmt: skip
    data = to_bytes(handed)
    ann, bob, cleo = from_bytes(data)
    assert len(data) < 1.5 * (adapter.nbytes() + side.nbytes()) + 20_000
    assert bob.adapter is ann.adapter, "clients of a pass have one value"
    assert cleo.side is ann.side
    assert (ann.client, cleo.client, ann.frozen, ann.wire) == ("ann", "cleo", frozenset({"A"}), Wire("int8", "bf16"))
    assert (ann.adapter.hash(), ann.side.hash()) == (adapter.hash(), side.hash())
    assert ann.adapter.pairs.keys() == adapter.pairs.keys()
    changed = ann.adapter.pairs[next(iter(adapter.pairs))].A
    assert changed.add_(1) is changed, "what arrives is the receiver's own"


def test_sparse_changes_scores_settings_and_numbers_of_numpy_arrive():
    sparse = small.sparse(small.model(), 0.1)
    score = Score(Mean(1.5, 3), np.arange(4).reshape(2, 2))
    train = TrainSettings(steps=3, optimizer_args={"betas": [0.8, 0.9]})
    of_numpy, other_dicts = [np.int64(3), np.float32(0.5), np.bool_(True)], MappingProxyType({"a": OrderedDict(b=1)})
    got, scored, settings, numbers, held = arrived([sparse, score, train, of_numpy, other_dicts])
    assert got.hash() == sparse.hash()
    assert got.sparse.keys() == sparse.sparse.keys()
    assert scored.loss == score.loss
    assert (scored.confusion == score.confusion).all()
    assert settings == train
    assert [(type(n), n) for n in numbers] == [(int, 3), (float, 0.5), (bool, True)]
    assert held == {"a": {"b": 1}}


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("value", [Evil(), print, Adapter.nbytes, pickle.Unpickler])
def test_bytes_make_values_of_ours_and_run_nothing(value, capsys):
    with pytest.raises(WireError, match=r"a message between processes with a .*; expected values of ours alone"):
        arrived({"a": value})
    assert capsys.readouterr().out == ""
