"""Who does what: a round's clients, or held-out rows, cut into one contiguous share for each process.

    clients in order:  [ a b c d | e f g h ]  one turn: each process trains its share, updates fold in this order

How a cohort is cut into passes decides floating-point sums. Shares are whole passes where that costs little, so that
the result is then the same to the bit with any number of processes; else it is the same to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from sheepfold.engines.common import Work

TURN_BYTES = 2**30
"""Updates that a process holds until the first one folds them; a larger share is trained in several turns."""
WHOLE_PASSES = 1.1
"""How much more work the busiest process may have for the sake of whole passes."""


def turns(costs: Sequence[float], shares: int, pass_size: int, update_bytes: int) -> Iterator[list[slice]]:
    """Yield, for turn after turn, the slice of the clients that each process trains.

    costs: of each client, in order; pass_size: clients that train together; update_bytes: of one update.
    """
    most = max(1, TURN_BYTES // max(1, update_bytes) // pass_size) * pass_size * shares
    for first in range(0, len(costs), most):
        turn = costs[first : first + most]
        yield [slice(first + part.start, first + part.stop) for part in _share(turn, shares, pass_size)]


def _share(costs: Sequence[float], shares: int, pass_size: int) -> list[slice]:
    passes = [sum(costs[i : i + pass_size]) for i in range(0, len(costs), pass_size)]
    by_pass, by_client = cut(passes, shares), cut(costs, shares)
    if _largest(passes, by_pass) > WHOLE_PASSES * _largest(costs, by_client):
        return by_client
    return [slice(s.start * pass_size, min(s.stop * pass_size, len(costs))) for s in by_pass]


def cut(costs: Sequence[float] | np.ndarray, shares: int) -> list[slice]:
    """Return contiguous slices, one a share, whose largest sum is as small as can be; the first ones are fullest."""
    ends = np.cumsum(costs, dtype=np.float64)
    if not len(ends):
        return [slice(0, 0)] * shares
    low, high = max(ends[-1] / shares, float(np.max(costs))), float(ends[-1])
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(ends, shares, middle)[-1] == len(ends) else (middle, high)
    places = [0, *_filled(ends, shares, high)]
    return [slice(a, b) for a, b in pairwise(places)]


def _filled(ends: np.ndarray, shares: int, limit: float) -> list[int]:
    """Return where each share ends that takes as much as fits under a limit, but for rounding."""
    places, before = [], 0.0
    for _ in range(shares):
        places.append(int(np.searchsorted(ends, before + limit + 1e-9 * ends[-1], side="right")))
        before = float(ends[places[-1] - 1]) if places[-1] else 0.0
    return places


def _largest(costs: Sequence[float], parts: Sequence[slice]) -> float:
    return max(sum(costs[part]) for part in parts)


def share_rows(work: Work, weights: np.ndarray | None, shares: int) -> list[list[tuple[int, np.ndarray]]]:
    """Return each process's part of some rows to judge: (place in the work, row numbers); an item may be split.

    weights: of every row by number, such as its tokens; None: all rows weigh the same. Items without rows are the first
    process's.
    """
    sizes = [len(numbers) for _, numbers in work]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(numbers for _, numbers in work)])
    places = np.repeat(np.arange(len(work)), sizes)
    parts: list[list[tuple[int, np.ndarray]]] = []
    for part in cut(np.ones(len(rows)) if weights is None else weights[rows], shares):
        mine, numbers = places[part], rows[part]
        parts.append([(int(i), numbers[mine == i]) for i in np.unique(mine)])
    parts[0] += [(i, work[i][1]) for i, size in enumerate(sizes) if not size]
    return parts


def adapters_of(work: Work) -> Mapping[int, int]:
    """Return the numbers of the adapters that some work asks for, and their places among these."""
    return {a: i for i, a in enumerate(sorted({a for a, _ in work}))}
