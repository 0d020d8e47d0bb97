"""What the server asks of every letter before it folds: that it is what this client was asked for, and nothing else.

Each check raises WireError with one line. What is checked costs a pass over the names, and one over the numbers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sheepfold.adapter import all_finite, kind
from sheepfold.errors import WireError
from sheepfold.messages import Assignment
from sheepfold.strategies.base import Beside
from sheepfold.wire.dtypes import SCALES, Format, narrowed_specs
from sheepfold.wire.ends import Terms, ranks_sent
from sheepfold.wire.packing import ADAPTER, MEMORY, Letter

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
EXTRA_SHARE = 4
"""A strategy that does not declare what clients send beside the adapter may be sent this many times its bytes."""


def check_letter(letter: Letter, handed: Assignment, terms: Terms) -> None:
    """Raise WireError unless a letter answers this assignment: client, round, format, names, ranks, shapes, scales."""
    if letter.client != handed.client:
        raise WireError(f"an update in the name of {letter.client[:60]!r}; a client sends its own alone")
    if letter.round != handed.round:
        raise WireError(f"an update of round {letter.round + 1}, expected round {handed.round + 1}; was it sent again?")
    if letter.wire != handed.wire.up:
        raise WireError(f"an update in {letter.wire}, expected {handed.wire.up}")
    if letter.measurements.rows < 1 or not letter.measurements.steps:
        raise WireError(f"an update after {letter.measurements.steps} steps on {letter.measurements.rows} rows")
    wanted = {ADAPTER + name: t for name, t in handed.trained(terms.private).items()}
    ranks = ranks_sent(letter.tensors)
    expected = _narrowed({n: (t.dtype, _shape(n, t, ranks, handed, terms)) for n, t in wanted.items()}, letter.wire)
    sent = {n: t for n, t in letter.tensors.items() if not n.startswith(MEMORY)}
    _check_tensors(sent, expected, letter.wire)
    _check_scales(letter, handed, ranks)
    beside = {n: t for n, t in letter.tensors.items() if n.startswith(MEMORY)}
    _check_beside(beside, letter.wire, terms.declared(handed), sent)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise WireError unless every number is finite."""
    if all_finite(tensors.values()):
        return
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            bad = int((~torch.isfinite(t)).sum())
            raise WireError(f"{name}: {bad:,} of {t.numel():,} numbers are not finite")


def _shape(
    name: str, handed_out: Tensor, ranks: Mapping[str, int], handed: Assignment, terms: Terms
) -> tuple[int, ...]:
    """Return the shape that a tensor must have: as it was handed out, or with a smaller rank where that may be."""
    path, of = name.removeprefix(ADAPTER).rpartition("/")[0], kind(name)
    shape = tuple(handed_out.shape)
    if of not in ("A", "B", "core") or path not in ranks:
        return shape
    rank, most = ranks[path], handed.adapter.pairs[path].rank
    if rank == most:
        return shape
    if rank > most or rank < 1 or not terms.may_shrink:
        at_most = "1 to " if terms.may_shrink else ""
        raise WireError(f"{path}: rank {rank}, expected {at_most}{most}")
    return {"A": (rank, shape[-1]), "B": (shape[0], rank), "core": (rank, rank)}[of]


def _narrowed(expected: Shapes, wire: Format) -> Shapes:
    specs = tuple((name, dtype, shape) for name, (dtype, shape) in expected.items())
    return {name: (dtype, shape) for name, dtype, shape in narrowed_specs(specs, wire)}


def _check_tensors(found: Mapping[str, Tensor], expected: Shapes, wire: Format) -> None:
    """Raise WireError unless the tensors are exactly the expected ones."""
    if missing := sorted(expected.keys() - found.keys()):
        raise WireError(f"an update without {missing[0]}, and {len(missing) - 1} more")
    if odd := sorted(found.keys() - expected.keys()):
        raise WireError(f"an update with {odd[0][:200]!r}, which nobody asked for")
    for name, (dtype, shape) in expected.items():
        tensor = found[name]
        if tensor.dtype != dtype and not (wire == "fp32" and _as_good(tensor.dtype, dtype)):
            raise WireError(f"{name}: {_format(tensor.dtype)}, expected {_format(dtype)}")
        if tuple(tensor.shape) != shape:
            raise WireError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")


def _check_scales(letter: Letter, handed: Assignment, ranks: Mapping[str, int]) -> None:
    """Raise WireError unless every pair has the alpha that it was handed out with."""
    for path, scale in letter.scales.items():
        if path not in handed.adapter.pairs:
            raise WireError(f"an update with a pair {path[:200]!r}, which nobody asked for")
        pair = handed.adapter.pairs[path]
        rank = ranks.get(path, pair.rank)
        expected = pair.scale if rank == pair.rank else pair.scale * pair.rank / rank
        if abs(scale - expected) > 1e-9 * abs(expected):
            raise WireError(f"{path}: scale {scale:g}, expected {expected:g}")


def _check_beside(
    found: Mapping[str, Tensor], wire: Format, declared: Mapping[str, Beside] | None, sent: Mapping[str, Tensor]
) -> None:
    """Raise WireError for what an update brings beside the adapter and the strategy has no place for."""
    if declared is not None:
        shapes = {MEMORY + name: (what.dtype, _length(found, name, what)) for name, what in declared.items()}
        _check_tensors(found, _narrowed(shapes, wire), wire)
        return
    size, most = (sum(t.numel() * t.element_size() for t in part.values()) for part in (found, sent))
    if size > EXTRA_SHARE * most + 65536:
        raise WireError(f"{size:,} bytes beside the adapter, expected at most {EXTRA_SHARE} times its {most:,}")
    whole: Shapes = {n: (torch.float32, tuple(t.shape)) for n, t in found.items() if t.dtype == torch.int8}
    if wire == "int8" and whole:
        kept = {n: t for n, t in found.items() if n.removesuffix(SCALES) in whole}
        _check_tensors(kept, _narrowed(whole, wire), wire)


def _length(found: Mapping[str, Tensor], name: str, what: Beside) -> tuple[int, ...]:
    """Return the shape that a tensor beside the adapter must have: as declared, or shorter where that may be."""
    sent = found.get(MEMORY + name)
    if what.up_to and sent is not None and sent.dim() == len(what.shape) and 1 <= len(sent) <= what.shape[0]:
        return (len(sent), *what.shape[1:])
    return what.shape


def _as_good(found: torch.dtype, expected: torch.dtype) -> bool:
    """Return whether numbers that travel as they are may have this format: bases in float64 train in it."""
    return found in (torch.float32, torch.float64, expected) and expected.is_floating_point


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
