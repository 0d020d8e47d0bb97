"""Which cases of a test the plain suite takes."""

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet


def mostly_slow(cases: Iterable[str], quick: Iterable[str]) -> list[ParameterSet]:
    """Return a parameter for each case: `quick` ones are in the plain suite, all others wait for `make test-slow`.

    Raises ValueError where a quick one is no case.
    """
    cases, quick = list(cases), set(quick)
    if missing := quick - set(cases):
        raise ValueError(f"no case {', '.join(sorted(missing))}")
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow, id=case) for case in cases]
