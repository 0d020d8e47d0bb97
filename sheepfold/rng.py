"""Random draws with an address.

A draw is named by its place in the run, such as (seed, "cohort", round): the same place gives the same draw in any
process, in any order, and after a resume. Nothing here touches a global generator.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Name = str | int


def derive(seed: int, *names: Name) -> int:
    """Return the 63-bit integer that belongs to this address."""
    address = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *names: Name) -> np.random.Generator:
    """Return a numpy generator that starts at this address."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))


def torch_stream(seed: int, *names: Name) -> "torch.Generator":
    """Return a CPU torch generator that starts at this address."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))
