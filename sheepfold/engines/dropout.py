"""Dropout whose mask is a function of where it is drawn: (seed, round, client, step), row, layer, token, number.

A generator's draws depend on the order of everything drawn before. Here a hash of the address decides each number, so a
client's masks are the same alone or in a cohort, however its rows are cut into micro-batches or padded, on any device,
and when activations are recomputed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_M1, _M2 = -0x61C8864680B583EB, -0x3B314601E57A13AD
"""Odd 64-bit multipliers: the golden ratio's (Knuth) and MurmurHash3's finaliser's."""


@dataclass(frozen=True, slots=True)
class RowKeys:
    """One 63-bit key for each row of a batch: hash of (seed, round, client, step) and the row's place in the step."""

    keys: Tensor
    """(rows,) int64"""


def dropout(x: Tensor, p: float, rows: RowKeys, site: int) -> Tensor:
    """Return x with a share p of its numbers set to zero and the rest divided by 1 - p.

    x: (rows, tokens, d), or (rows * tokens, d) for families that flatten them. The mask of a number depends on its
    row's key, the site, the token's place in the row and the number's place in the vector, and on nothing else.
    """
    shape = x.shape
    x = x.view(len(rows.keys), -1, shape[-1])
    token = torch.arange(x.shape[1], device=x.device)
    number = torch.arange(x.shape[2], device=x.device)
    row = _mix(rows.keys ^ _mix(torch.tensor(site + 1, device=x.device)))
    place = _mix(row[:, None] + token * _M1)
    # (rows, tokens, d) numbers are hashed, so in place and with one round: row and token are mixed already
    hashed = place[:, :, None] ^ (number * _M2)
    hashed ^= hashed >> 32
    hashed *= _M1
    kept = (hashed >> 40) >= int(p * 2**24) - 2**23  # the top 24 bits, signed
    return (x * (kept.to(x.dtype) / (1 - p))).view(shape)


def _mix(h: Tensor) -> Tensor:
    """Return a 64-bit hash in which every bit of h moves every bit of the result (splitmix64's last steps)."""
    h = (h ^ (h >> 30)) * _M2
    h = (h ^ (h >> 27)) * _M1
    return h ^ (h >> 31)
