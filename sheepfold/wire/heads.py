"""What a message's JSON head may hold: each field read for what it must be, and refused in one line where it is not."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from sheepfold.adapter import Adapter
from sheepfold.errors import WireError

T = TypeVar("T")
LONGEST_NAME = 1000
"""Characters of a client's or a tensor's name."""
LONGEST_REASON = 480
"""Characters of why a message does not count."""
NOT_PLAIN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
"""What would take over a terminal, begin a line, or be no character of a file (half of a pair of surrogates)."""


def check_common(head: Mapping[str, Any], format: int, run: str, sorts: Sequence[str]) -> str:
    """Return which sort of message it is; raise WireError for another format, run or sort than is expected."""
    if (found := head.get("format")) != format:
        raise WireError(f"a message of format {_shown(found)}, expected {format}; both sides need the same sheepfold")
    if (theirs := head.get("run")) != run:
        raise WireError(f"a message of run {_shown(theirs)}, expected {run}; it was sent before this run began")
    return one_of(head, "message", sorts)


def one_of(head: Mapping[str, Any], name: str, known: Sequence[T]) -> T:
    """Return one of these values."""
    if (value := head.get(name)) not in known or isinstance(value, bool):
        raise WireError(f"its {name} is {_shown(value)}, expected {' or '.join(map(str, known))}")
    return cast(T, value)


def plain(value: str, longest: int) -> str:
    """Return a text of somebody else's as one line for terminals, journals and pages, cut to this many characters."""
    return NOT_PLAIN.sub(" ", value[:longest])


def rejected(error: Exception) -> str:
    """Return why a message does not count, as a journal has it: what is wrong may quote the message."""
    return plain(f"rejected: {error}", LONGEST_REASON)


def text(head: Mapping[str, Any], name: str, longest: int = LONGEST_NAME) -> str:
    """Return a text, without characters that would take over a terminal."""
    value = head.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise WireError(f"its {name} is {_shown(value)}, expected a text of at most {longest} characters")
    return plain(value, longest)


def count(head: Mapping[str, Any], name: str) -> int:
    """Return a whole number of at least 0."""
    value = head.get(name)
    if type(value) is not int or not 0 <= value < 2**53:
        raise WireError(f"its {name} is {_shown(value)}, expected a whole number of at least 0")
    return value


def number(head: Mapping[str, Any], name: str) -> float:
    """Return a finite number."""
    value = head.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WireError(f"its {name} is {_shown(value)}, expected a number")
    return float(value)


def names(head: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of different names."""
    value = head.get(name)
    fine = isinstance(value, list) and all(isinstance(v, str) and len(v) <= LONGEST_NAME for v in value)
    if not fine or len(set(cast(list[str], value))) < len(cast(list[str], value)):
        raise WireError(f"its {name} is {_shown(value)}, expected a list of different names")
    return cast(list[str], value)


def floats(head: Mapping[str, Any], name: str, paths: Sequence[str]) -> dict[str, float]:
    """Return a finite number for each of these paths; one in the head stands for all."""
    value = head.get(name)
    if not isinstance(value, list) or len(value) not in {1, len(paths)} or not (value or not paths):
        raise WireError(f"its {name} is {_shown(value)}, expected a number for each of {len(paths)} pairs")
    numbers = [number({name: v}, name) for v in value]
    return dict(zip(paths, numbers * len(paths) if len(numbers) == 1 else numbers, strict=False))


def shapes(head: Mapping[str, Any], name: str, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) for each of these paths."""
    value = head.get(name)
    if not isinstance(value, list) or len(value) != len(paths):
        raise WireError(f"its {name} is {_shown(value)}, expected a shape for each of {len(paths)} modules")
    for shape in value:
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
            raise WireError(f"its {name} has {_shown(shape)}, expected the two sides of a weight")
    return {path: (shape[0], shape[1]) for path, shape in zip(paths, value, strict=True)}


def check_fits(adapter: Adapter, made: Callable[[str], str] = str) -> None:
    """Raise WireError where an adapter's tensors do not go together."""
    for path, pair in adapter.pairs.items():
        if pair.A.dim() != 2 or pair.B.dim() != 2 or pair.A.shape[0] != pair.B.shape[1]:
            shapes_ = f"A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}"
            raise WireError(f"{made(path)}: {shapes_} are no pair, expected A (r, d_in) and B (d_out, r)")
        if pair.core is not None and pair.core.shape != (pair.rank, pair.rank):
            raise WireError(f"{made(path)}: core is {tuple(pair.core.shape)}, expected {(pair.rank, pair.rank)}")
    for path, sparse in adapter.sparse.items():
        if sparse.values.dim() != 1 or sparse.values.shape != sparse.positions.shape:
            raise WireError(
                f"{made(path)}: {tuple(sparse.values.shape)} values, expected one for each of "
                f"{tuple(sparse.positions.shape)} positions"
            )


def _shown(value: Any) -> str:
    return str(value)[:60] if isinstance(value, int | float) else repr(value)[:60]
