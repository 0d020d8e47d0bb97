"""Means of few runs with 95 % intervals: Student's t, and Welch's for a difference of two groups."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and how far on either side of it its 95 % interval reaches; None where one value tells nothing of it."""

    mean: float
    reach: float | None
    count: int
    paired: bool = False
    """Whether it is a mean of differences within pairs."""

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of zero."""
        return self.reach is not None and abs(self.mean) > self.reach


def t_975(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t.

    Up to 30 from the table, a fraction rounded down, which widens the interval. Beyond, the expansion around the normal
    quantile z in powers of 1/n: z + (z^3 + z)/4n + (5z^5 + 16z^3 + 3z)/96n^2, right to 4 digits there.
    Source: Abramowitz and Stegun, 26.7.5.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, found {degrees}")
    if degrees < 31:
        return T_975[int(degrees) - 1]
    z = 1.959963985
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with mean ± t s / sqrt(n); raises ValueError for none."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, t_975(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval:
    """Return ours - theirs, both by seed: within pairs where the seeds are the same, else Welch's interval.

    Source: Welch 1947; degrees of freedom (u + v)^2 / (u^2/(n-1) + v^2/(m-1)) with u, v the squared standard errors.
    """
    if ours.keys() == theirs.keys():
        found = interval([ours[seed] - theirs[seed] for seed in ours])
        return Interval(found.mean, found.reach, found.count, paired=True)
    mean = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    n, m = len(ours), len(theirs)
    if min(n, m) < 2:
        return Interval(mean, None, min(n, m))
    u, v = statistics.variance(ours.values()) / n, statistics.variance(theirs.values()) / m
    if u + v == 0:
        return Interval(mean, 0.0, min(n, m))
    degrees = (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1))
    return Interval(mean, t_975(degrees) * math.sqrt(u + v), min(n, m))
