"""Draws belong to their address and to nothing else."""

import subprocess
import sys

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.rng import derive, stream, torch_stream

NAMES = st.lists(st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=5)), max_size=3).map(tuple)


@settings(deadline=None)
@given(st.integers(0, 2**63), NAMES)
def test_an_address_gives_the_same_63_bits_every_time(seed, names):
    assert derive(seed, *names) == derive(seed, *names)
    assert 0 <= derive(seed, *names) < 2**63


@settings(deadline=None)
@given(st.integers(0, 9), NAMES, st.integers(0, 9), NAMES)
def test_different_addresses_give_different_numbers(seed, names, other_seed, other_names):
    same = (seed, *names) == (other_seed, *other_names)
    assert (derive(seed, *names) == derive(other_seed, *other_names)) == same


def test_neither_types_nor_boundaries_of_names_are_confused():
    addresses = [(0, "1"), (0, 1), (0, "a", "b"), (0, "ab"), (0, "a", ""), (0, "", "a"), (0,), (0, "")]
    assert len({derive(*address) for address in addresses}) == len(addresses)


def test_streams_repeat_and_leave_the_global_generators_alone():
    np.random.seed(0)
    before, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second = stream(1, "cohort", 3).random(4), torch.rand(4, generator=torch_stream(1, "cohort", 3))
    assert np.array_equal(stream(1, "cohort", 3).random(4), first)
    assert torch.equal(torch.rand(4, generator=torch_stream(1, "cohort", 3)), second)
    assert not np.array_equal(stream(1, "cohort", 4).random(4), first)
    assert np.array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), before_torch)


def test_another_process_draws_the_same():
    code = "from sheepfold.rng import derive, stream; print(derive(7, 'x', 2), stream(7, 'x', 2).integers(1 << 60))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(derive(7, "x", 2)), str(stream(7, "x", 2).integers(1 << 60))]


def test_addresses_stay_what_they_were_in_earlier_releases():
    # A resumed run draws from these: changing them breaks every saved state.
    assert derive(0) == 6_711_488_920_161_924_273
    assert derive(42, "cohort", 3) == 7_681_683_086_123_783_748
