"""Random directions: standard normal numbers, each a function of its address alone, the same ones on every machine."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold import seeded
from sheepfold.errors import TrainingError

MASK = (1 << 64) - 1


def mixed(x: int) -> int:
    """SplitMix64's finaliser, in plain integers, as it is published."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def number(key: tuple[int, int], element: int) -> float:
    """One element of a direction, by an oracle of its own: plain integers, and quantiles in float64."""
    word = mixed(mixed((element // 4 + key[0]) & MASK) ^ key[1])
    bits = (word >> 16 * (element % 4)) & 0xFFFF
    signed = bits - (1 << 16) if bits >= 1 << 15 else bits
    return NormalDist().inv_cdf((signed + (1 << 15) + 0.5) / (1 << 16))


def test_the_mix_is_splitmix64s():
    state, known = 0, []
    for _ in range(3):  # SplitMix64 from seed 0, as Vigna's reference implementation prints it
        state = (state + 0x9E3779B97F4A7C15) & MASK
        known.append(mixed(state))
    assert known == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(0, 2**33))
def test_an_element_is_what_the_formula_says(seed, candidate, element):
    keys = seeded.keys(seed, 3)[candidate : candidate + 1]
    found = float(seeded.normals(keys, element, 1))
    assert found == pytest.approx(number(tuple(keys[0].tolist()), element), rel=2e-4)  # the table has unit variance


def test_these_numbers_never_change():
    made = seeded.normals(seeded.keys(0, 2), 5, 3)
    assert seeded.keys(0, 2).tolist() == GOLDEN_KEYS
    assert [[x.hex() for x in row] for row in made.tolist()] == GOLDEN


GOLDEN_KEYS = [
    [5654575695656001560, 4889076797390935545],
    [7365058079842718132, 8324263953026160348],
]
GOLDEN = [
    ["0x1.ba6f2c0000000p-3", "-0x1.7e5ede0000000p-2", "0x1.2b1aca0000000p-1"],
    ["-0x1.a53e5e0000000p-1", "-0x1.2d99260000000p+0", "-0x1.2e34e80000000p+0"],
]


def test_they_are_standard_normal():
    z = seeded.normals(seeded.keys(1, 8), 0, 1 << 18).double().numpy()
    n = z.size
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n) + 0.01  # a table ends at 4.3
    shares = np.histogram(
        z, [NormalDist().inv_cdf(i / 64) if 0 < i < 64 else math.copysign(9, i - 1) for i in range(65)]
    )
    assert ((shares[0] - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)


def test_elements_candidates_and_runs_know_nothing_of_each_other():
    n = 1 << 18
    one, two = seeded.normals(seeded.keys(0, 2), 0, n).double()
    other = seeded.normals(seeded.keys(1, 1), 0, n)[0].double()
    pairs = [(one, two), (one, other), *((one[lag:], one[:-lag]) for lag in (1, 2, 3, 4, 5, 64, 4096))]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 5 / math.sqrt(n)
        assert abs(float((a.square() * b.square()).mean()) - 1) < 5 * math.sqrt(8 / n)


def test_the_table_has_unit_variance_and_no_drift():
    table = seeded._table(torch.device("cpu")).double()
    assert len(table) == seeded.LEVELS
    assert float(table.mean()) == 0
    assert float(table.square().mean()) == pytest.approx(1, abs=1e-7)
    assert bool((table.diff() > 0).all())


@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_parts_are_the_whole_however_it_is_cut(start, lengths):
    keys = seeded.keys(3, 3)
    whole = seeded.normals(keys, start, sum(lengths))
    ends = np.cumsum([0, *lengths])
    parts = [seeded.normals(keys, start + int(e), n) for e, n in zip(ends, lengths, strict=False)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 3), st.sampled_from([8, 64, 1 << 17]))
def test_a_sum_of_directions_has_the_same_bits_however_it_is_cut(start, length, few, chunk):
    keys, amounts = seeded.keys(7, 9), torch.linspace(-1, 1, 9)
    weights = torch.arange(length, dtype=torch.float32) / 7
    expected = weights.clone()
    total = torch.zeros(length)
    for z, amount in zip(seeded.normals(keys, start, length), amounts, strict=True):
        total = total + z * amount
    expected += total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeded, "chunk", lambda device: chunk)
        found = weights.clone()
        cut = min(few, length)
        seeded.add_directions(found[:cut], start, keys, amounts)
        seeded.add_directions(found[cut:], start + cut, keys, amounts)
    assert torch.equal(found, expected)


def test_a_sum_of_directions_is_the_float64_sum_but_for_rounding():
    keys, amounts = seeded.keys(0, 200), torch.randn(200, generator=torch.Generator().manual_seed(0)) / 100
    weights = torch.linspace(-1, 1, 300)
    expected = weights.double() + amounts.double() @ seeded.normals(keys, 40, 300).double()
    seeded.add_directions(weights, 40, keys, amounts)
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)


def test_a_machine_that_draws_other_numbers_is_refused(monkeypatch):
    table = seeded._table(torch.device("cpu")).clone()
    table[1234] = torch.nextafter(table[1234], torch.tensor(9.0))
    monkeypatch.setattr(seeded, "_table", lambda device: table)
    seeded._checked.cache_clear()
    try:
        with pytest.raises(TrainingError, match="on other machines"):
            seeded.normals(seeded.keys(0, 1), 0, 4)
    finally:
        seeded._checked.cache_clear()
