"""pass@k: the chance that one of k answers drawn from n passes its tests.

    pass@k = 1 - C(n - c, k) / C(n, k)        n answers, c of them passed

Source: Chen et al., arXiv:2107.03374, eq. 1; unbiased, where 1 - (1 - c/n)^k is not.
"""

from collections.abc import Sequence
from math import comb

from sheepfold.errors import ConfigError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the estimate for one problem from n answers of which c passed. Raises ConfigError unless 1 <= k <= n."""
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ConfigError(f"pass@{k} of {n} answers with {c} passed: k must be 1 to {n}; sample at least k answers")
    return 1.0 - comb(n - c, k) / comb(n, k)


def pass_at_ks(n: int, c: int, ks: Sequence[int]) -> dict[str, float]:
    """Return {"pass@k": estimate} for the ks that n answers allow, or pass@1 where they allow none of them."""
    kept = [k for k in ks if k <= n] or [1]
    return {f"pass@{k}": pass_at_k(n, c, k) for k in kept}
