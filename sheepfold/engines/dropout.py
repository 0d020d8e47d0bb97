"""Dropout whose mask is a function of where it is drawn: (seed, round, client, step), row, layer, token, number.

A generator's draws depend on the order of everything drawn before. Here a hash of the address decides each number, so a
client's masks are the same alone or in a cohort, however its rows are cut into micro-batches or padded, on any device,
and when activations are recomputed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sheepfold.engines.batches import Pack

_M1, _M2 = -0x61C8864680B583EB, -0x3B314601E57A13AD
"""Odd 64-bit multipliers: the golden ratio's (Knuth) and MurmurHash3's finaliser's."""


@dataclass(frozen=True, slots=True)
class RowKeys:
    """One 63-bit key for each row of a batch: hash of (seed, round, client, step) and the row's place in the step."""

    keys: Tensor
    """(rows,) int64"""
    pack: Pack | None = None
    """Where rows lie end to end, how"""

    def places(self, tokens: int) -> Tensor:
        """Return one hash for each token, (rows, tokens): of its row's key and its place in the row."""
        if self.pack is not None:
            return _mix(self.keys[self.pack.row][None] + self.pack.positions * _M1)
        return _mix(self.keys[:, None] + torch.arange(tokens // len(self.keys), device=self.keys.device) * _M1)


def dropout(x: Tensor, p: float, rows: RowKeys, site: int) -> Tensor:
    """Return x with a share p of its numbers set to zero and the rest divided by 1 - p.

    x: (rows, tokens, d), packed (1, tokens, d), or (rows * tokens, d) for families that flatten them. The mask of a
    number depends on its row's key, the site, the token's place in the row and the number's place in the vector, and on
    nothing else.
    """
    shape = x.shape
    own = replace(rows, keys=_mix(rows.keys ^ _mix(torch.full((), site + 1, device=x.device))))
    place = own.places(x.numel() // shape[-1])
    x = x.view(*place.shape, shape[-1])
    number = torch.arange(shape[-1], device=x.device)
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
