"""Random directions that travel as numbers: z is a pure function of (seed, candidate, element), the same bits anywhere.

    word(i)  = mix(mix(i // 4 + key_0) ^ key_1)            64 bits, mix: SplitMix64's finaliser
    z(i)     = table[bits 16 (i mod 4) ... of word(i)]     one of 65,536 standard normal numbers

A library's own generator gives other numbers on another device, in another dtype, order or version. Here there are
64-bit integers and one table, so a server and its clients draw alike. Elements are counted over all weights of a model
in the order of their names, so nobody holds z whole.

Sources: counter-based generators, Salmon et al., SC 2011, doi:10.1145/2063384.2063405; the mix, Steele, Lea and Flood,
OOPSLA 2014, doi:10.1145/2660193.2660195 (variant 13 of Stafford's). Two keys, one on each side of a mix, keep the words
of two candidates from being one sequence with an offset.
"""

import hashlib
import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from sheepfold.errors import TrainingError
from sheepfold.rng import derive

LEVELS = 1 << 16
"""Numbers in the table; the largest is 4.3."""
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_LAST = 31
SAMPLE = "443a83d3"
"""Digest of the first numbers of candidate 0 of seed 0 (see `_checked`)."""


def keys(seed: int, candidates: int) -> Tensor:
    """Return the two keys of each candidate of a run, (candidates, 2) int64, on the CPU."""
    return torch.tensor([[derive(seed, "direction", s, half) for half in (0, 1)] for s in range(candidates)])


def normals(keys: Tensor, start: int, count: int) -> Tensor:
    """Return elements start ... start + count - 1 of each candidate's direction, (S, count) float32.

    keys: (S, 2) int64, on the device that the numbers are wanted on. Raises TrainingError on a machine that draws other
    numbers than all others.
    """
    _checked(keys.device)
    return _normals(keys, start, count)


def add_directions(weights: Tensor, start: int, keys: Tensor, amounts: Tensor) -> None:
    """Add sum_s amounts_s z_s to a part of the weights, in place.

    weights: (n,) float32 or wider, whose first is element `start`; keys: (S, 2); amounts: (S,) in the weights' dtype.
    The sum is taken in the order given, number by number, and then added, so the bits depend on nothing else.
    """
    few = chunk(weights.device)
    for first in range(0, len(weights), few):
        part = weights[first : first + few]
        total = torch.zeros_like(part)
        together = max(1, few // len(part))
        for some, much in zip(torch.split(keys, together), torch.split(amounts, together), strict=True):
            # product and sum apart: fused into one operation they would round once, on some machines
            for step in normals(some, start + first, len(part)).to(part.dtype).mul_(much[:, None]):
                total += step
        part += total


def chunk(device: torch.device) -> int:
    """Return how many elements are made at once: what stays in a CPU's caches, or fills a GPU."""
    return 1 << 24 if device.type == "cuda" else 1 << 17


def _normals(keys: Tensor, start: int, count: int) -> Tensor:
    first, end = start // 4, -(-(start + count) // 4)
    words = torch.arange(first, end, device=keys.device) + keys[:, :1]
    spare = torch.empty_like(words)
    _mix(words, spare)
    words ^= keys[:, 1:]
    _mix(words, spare)
    at = words.view(torch.int16).to(torch.int32).add_(LEVELS // 2)
    skip = start - 4 * first
    return _table(keys.device).index_select(0, at.view(-1)).view(at.shape)[:, skip : skip + count]


def _mix(words: Tensor, spare: Tensor) -> None:
    """Mix 64-bit words in place; they wrap around. Shifts fill with zeros, which int64's own do not."""
    for shift, factor in _MIX:
        torch.bitwise_right_shift(words, shift, out=spare)
        words ^= spare.bitwise_and_((1 << 64 - shift) - 1)
        words *= factor
    torch.bitwise_right_shift(words, _LAST, out=spare)
    words ^= spare.bitwise_and_((1 << 64 - _LAST) - 1)


@lru_cache
def _table(device: torch.device) -> Tensor:
    """Return the normal quantiles at the middles of LEVELS equal shares, scaled to unit variance, ascending."""
    half = [NormalDist().inv_cdf((LEVELS / 2 + i + 0.5) / LEVELS) for i in range(LEVELS // 2)]
    scale = math.sqrt(LEVELS / 2 / math.fsum(x * x for x in half))
    upper = torch.tensor([x * scale for x in half], dtype=torch.float64).float()
    return torch.cat([-upper.flip(0), upper]).to(device)


@lru_cache
def _checked(device: torch.device) -> None:
    """Raise TrainingError where this device, byte order or mathematics library makes other numbers."""
    made = _normals(torch.tensor([[0, 1]], device=device), 0, LEVELS).cpu().numpy()
    whole = made.tobytes() + _table(device).cpu().numpy().tobytes()
    if (found := hashlib.blake2b(whole, digest_size=4).hexdigest()) != SAMPLE:
        raise TrainingError(
            f"random directions on {device}: they have digest {found}, and {SAMPLE} on other machines, so that clients "
            "and server would not agree; use another machine"
        )
