"""Rows end to end: what training comes to is what padded rows come to, in every family that may pack."""

import dataclasses
import itertools

import pytest
import torch

from sheepfold.config import TrainSettings
from sheepfold.engines.batches import Row
from sheepfold.engines.owners import Packed, Rows, through
from sheepfold.engines.packing import may_pack, packs
from sheepfold.errors import ModelError
from tests import small

TRAIN = TrainSettings(steps=5, batch_rows=4, micro_rows=2, lr=1e-3)
RANKS = {"ann": 2, "bob": 4, "cleo": 8, "dora": 4}


def trained(family: str, *, packing: bool, dropout: float = 0.0, again: bool = False, **config: object):
    base = small.model(torch.float64, family, **config)
    start = {c: small.adapter(base, r, seed, family) for seed, (c, r) in enumerate(RANKS.items())}
    train = TRAIN.model_copy(update={"packing": packing, "gradient_checkpointing": again})
    engine = small.cohort_engine(base, train, family, dropout=dropout)
    engine.plan = dataclasses.replace(engine.plan, micro_tokens=100)
    assert engine.packs is packing
    assert engine.plan.recompute is again
    done = {u.client: u.adapter for u in engine.train(small.assignments(start))}
    engine.close()
    return start, done


@pytest.mark.parametrize("family", [f for f in small.FAMILIES if f != "gemma2"])
def test_packed_rows_train_as_padded_ones_do_in_every_family(family):
    start, packed = trained(family, packing=True)
    _, padded = trained(family, packing=False)
    assert max(small.gap(packed[c], padded[c]) for c in packed) < 1e-10
    assert min(small.gap(packed[c], start[c]) for c in packed) > 1e-4


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_goes_with_packing(family):
    window = {
        "sliding_window": 6,
        **({"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}),
    }
    _, packed = trained(family, packing=True, **window)
    _, padded = trained(family, packing=False, **window)
    _, whole = trained(family, packing=True)
    assert max(small.gap(packed[c], padded[c]) for c in packed) < 1e-10
    assert max(small.gap(packed[c], whole[c]) for c in packed) > 1e-6, "no row is longer than the window"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_are_computed_again_attend_within_rows_again(family):
    _, packed = trained(family, packing=True, again=True)
    _, padded = trained(family, packing=False)
    assert max(small.gap(packed[c], padded[c]) for c in packed) < 1e-10


def test_dropout_draws_the_same_for_packed_rows():
    _, packed = trained("llama", packing=True, dropout=0.3)
    _, padded = trained("llama", packing=False, dropout=0.3)
    _, without = trained("llama", packing=True)
    assert max(small.gap(packed[c], padded[c]) for c in packed) < 1e-10
    assert max(small.gap(packed[c], without[c]) for c in packed) > 1e-4


def test_a_family_whose_rows_cannot_be_packed_is_found_and_said():
    base = small.model(torch.float64, "gemma2")  # it caps attention's scores
    assert not may_pack(base)
    with pytest.raises(ModelError, match=r"train\.packing: rows of Gemma2ForCausalLM cannot be packed") as caught:
        small.cohort_engine(base, TRAIN.model_copy(update={"packing": True}), "gemma2")
    assert "\n" not in str(caught.value)


def test_packs_hold_every_row_once_in_order_and_no_more_tokens_than_allowed():
    tokens = small.tokens()
    rows = [Row(n, n // 9, n) for n in range(len(tokens))]
    made = list(packs(tokens, rows, max_rows=5, max_tokens=80))
    assert [p for b in made for p in b.place.tolist()] == list(range(len(rows)))
    assert all(len(b.group) <= 5 and (b.ids.numel() <= 80 or len(b.group) == 1) for b in made)
    assert any(len(b.group) == 5 for b in made)
    assert any(len(b.group) < 5 for b in made[:-1]), "some pack ends because of its tokens"
    for batch in made:
        assert batch.pack is not None
        ids = batch.ids[0]
        parts = [ids[a:b] for a, b in itertools.pairwise(batch.pack.starts.tolist())]
        assert all(torch.equal(part, tokens.row(n)[0]) for part, n in zip(parts, batch.place.tolist(), strict=True))
        assert sum(batch.pack.tokens_of) == batch.useful_tokens == ids.numel()


def test_a_row_longer_than_a_pack_gets_one_of_its_own():
    made = list(packs(small.tokens(), [Row(n, 0) for n in range(6)], max_rows=9, max_tokens=1))
    assert [len(b.group) for b in made] == [1] * 6


@pytest.mark.parametrize("links", [1, 2, 3])
@pytest.mark.parametrize("frozen", [None, 0, -1])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_products_and_their_gradients_are_those_of_rows(links, frozen, grouped, monkeypatch):
    """grouped: through the kernel that CUDA has for it, whose CPU version has the same arguments; frozen: a matrix that
    all clients share."""
    from sheepfold.engines import owners

    if grouped:
        monkeypatch.setattr(owners, "_may_group", lambda x, *sizes: True)
    torch.manual_seed(0)
    index, sizes = torch.tensor([0, 0, 2, 3]), [14, 0, 7, 7, 0]
    widths = [8, 16, 24, 40][: links + 1]
    chain = [(torch.randn(5, b, a) / a).requires_grad_() for a, b in itertools.pairwise(widths)]
    if frozen is not None:
        chain[frozen] = chain[frozen][:1].detach()
    x = torch.randn(4, 7, widths[0], requires_grad=True)
    y = torch.randn(4, 7, widths[-1], requires_grad=True)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]) if links > 1 else 1.0
    found = []
    for own, shape in ((Rows(index), (4, 7)), (Packed(sizes, x.device), (1, 28))):
        spread = own.spread(scale) if links > 1 else None
        out = through(x.view(*shape, -1), chain, own, onto=y.view(*shape, -1), scale=spread)
        grads = torch.autograd.grad(out.square().sum(), [x, y, *(m for m in chain if m.requires_grad)])
        found.append([out.view(4, 7, -1), *grads])
    for ours, rows in zip(*found, strict=True):
        torch.testing.assert_close(ours, rows, rtol=1e-5, atol=1e-4)
