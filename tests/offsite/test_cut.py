"""The rule of which layers an emulator has, against one written by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.errors import ConfigError, ModelError
from sheepfold.offsite.cut import adapter_ends, cut_of, kept_middle, trained
from sheepfold.offsite.settings import OffsiteSettings
from tests import small
from tests.offsite import bases

TABLE = [
    # L, emu_l, emu_r, ratio -> the full model's layers in the emulator
    (8, 1, 10, 0.5, [0, 1, 3, 6, 7]),  # FederatedScope-LLM's defaults: six between, round(3.0) = 3 of them
    (8, 2, 6, 0.5, [0, 1, 2, 5, 6, 7]),
    (8, 2, 6, 0.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    (8, 2, 6, 0.8, [0, 1, 3, 6, 7]),  # round(0.8) = 1: the middle one of 2, 3, 4, 5
    (8, 0, 6, 0.5, [0, 1, 5, 6, 7]),  # at least one layer below; five between, round(2.5) = 2: a half to even
    (8, 1, 6, 0.3, [0, 1, 2, 3, 5, 6, 7]),  # round(3.5) = 4 of five: 0, 1, 2, 4 of them
    (12, 1, 10, 0.5, [0, 1, 3, 6, 9, 10, 11]),  # round(4.5) = 4 of nine: 0, 2, 5, 8 of them
    (12, 2, 9, 0.4, [0, 1, 2, 4, 6, 8, 9, 10, 11]),
    (  # round(22.4) = 22 of 28: FederatedScope-LLM's preset
        32,
        2,
        30,
        0.2,
        [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20, 21, 22, 23, 25, 26, 27, 29, 30, 31],
    ),
    (32, 2, 30, 0.9, [0, 1, 2, 15, 29, 30, 31]),
    (40, 4, 36, 0.75, [0, 1, 2, 3, 4, 8, 12, 17, 21, 26, 30, 35, 36, 37, 38, 39]),
]


def by_hand(total: int, emu_l: int, emu_r: int, ratio: float) -> list[int]:
    """FederatedScope-LLM's rule, spelled out; n = 1 divides by zero there."""
    left, right = max(emu_l, 1), min(emu_r, total - 1)
    middle = list(range(left, right))
    n = round(len(middle) * (1 - ratio))
    stride = (len(middle) - 1) / (n - 1) if n > 1 else None
    kept = [middle[(len(middle) - 1) // 2]] if stride is None else [middle[int(i * stride + 1e-9)] for i in range(n)]
    return [*range(left), *kept, *range(right, total)]


def emulator(total: int, emu_l: int, emu_r: int, ratio: float) -> list[int]:
    left, right = adapter_ends(total, emu_l, emu_r)
    return [*range(left), *(left + i for i in kept_middle(right - left, ratio)), *range(right, total)]


@pytest.mark.parametrize(("total", "emu_l", "emu_r", "ratio", "expected"), TABLE)
def test_an_emulator_has_the_layers_of_the_table(total, emu_l, emu_r, ratio, expected):
    assert emulator(total, emu_l, emu_r, ratio) == expected == by_hand(total, emu_l, emu_r, ratio)


@given(st.integers(8, 96), st.integers(0, 8), st.integers(9, 120), st.floats(0, 0.99))
def test_any_cut_is_the_rules(total, emu_l, emu_r, ratio):
    left, right = adapter_ends(total, emu_l, emu_r) if max(emu_l, 1) < min(emu_r, total - 1) else (0, 0)
    if not left or not round((right - left) * (1 - ratio)):
        return
    kept = emulator(total, emu_l, emu_r, ratio)
    assert kept == by_hand(total, emu_l, emu_r, ratio)
    assert kept == sorted(set(kept))
    if len(kept) - left - (total - right) > 1:
        assert {left, right - 1} <= set(kept), "the first and the last middle layer stay"


def test_a_cut_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"drop_ratio 0.9: keeps round\(4 x 0.1\) = 0 of 4 middle layers; lower it"):
        kept_middle(4, 0.9)
    with pytest.raises(ConfigError, match=r"emu_l 5 and emu_r 5: of this model's 8 layers, .* none is left between"):
        adapter_ends(8, 5, 5)


@pytest.mark.parametrize("family", bases.FAMILIES)
@torch.no_grad()
def test_groups_name_every_tensor_of_a_family_once(family):
    count = {"n_layer": 8} if family == "gpt2" else {"num_hidden_layers": 8}
    model = small.model(family=family, **count)
    every = OffsiteSettings(**bases.ENDS, train=("layers", "embeddings", "head", "norm"))
    cut = cut_of(model, every)
    small_names = {n for n, _ in model.named_parameters()}  # a full model's names are an emulator's of ratio 0
    whole = cut_of(model, every.model_copy(update={"drop_ratio": 0.0}))
    middle = {n for n in small_names if any(n.startswith(f"{cut.layers}.{i}.") for i in (2, 3, 4, 5))}
    assert set(trained(model, whole)) == small_names - middle
    layers_alone = cut_of(model, OffsiteSettings(**bases.ENDS, drop_ratio=0.0))
    assert all(name.startswith(f"{cut.layers}.") for name in trained(model, layers_alone))


def test_a_named_list_of_layers_is_taken_and_a_wrong_name_is_refused():
    model = small.model(family="gpt2", n_layer=8)
    assert cut_of(model, OffsiteSettings(**bases.ENDS, layers="transformer.h")).layers == "transformer.h"
    with pytest.raises(ModelError, match=r"'transformer.g': no list of modules .* 'transformer.h'"):
        cut_of(model, OffsiteSettings(**bases.ENDS, layers="transformer.g"))


def test_one_of_two_tied_groups_alone_is_refused():
    tied = small.model(num_hidden_layers=8, tie_word_embeddings=True)
    for group in ("embeddings", "head"):
        with pytest.raises(ConfigError, match=rf"offsite.train {group}: this model's head is its input embedding"):
            cut_of(tied, OffsiteSettings(**bases.ENDS, train=("layers", group)))
    both = cut_of(tied, OffsiteSettings(**bases.ENDS, drop_ratio=0.0, train=("embeddings", "head")))
    assert trained(tied, both) == ["model.embed_tokens.weight"], "a tied tensor is trained once"
