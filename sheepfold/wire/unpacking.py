"""Blobs back to messages. What is well-formed is not yet believed: a letter goes through checks.py."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, from_delta, from_tensors, kind
from sheepfold.errors import WireError
from sheepfold.messages import Absence, Assignment, Measurements, Wire
from sheepfold.metrics import Mean
from sheepfold.wire import blob, heads
from sheepfold.wire.dtypes import Format, widened
from sheepfold.wire.foresight import STAGES
from sheepfold.wire.packing import (
    ADAPTER,
    COUNTS,
    DENSE,
    FACTORS,
    FORMAT,
    LONGEST_TEXT,
    MEASURED,
    MEMORY,
    RUN,
    SIDE,
    Letter,
    paths,
)

T = TypeVar("T")
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8")
LARGEST_SUM = 1e300
"""Of a client's losses, or of another measure: those of all clients together stay finite"""


def unpack_letter(data: bytes, run: str = RUN, most_bytes: int | None = None) -> tuple[Letter | Absence, int]:
    """Return the letter or the absence of a blob, and its round.

    Raises WireError for anything else, such as a message of another run.
    """
    head, tensors = blob.read(data, most_bytes)
    message = heads.check_common(head, FORMAT, run, ("update", "absence"))
    client, round = heads.text(head, "client"), heads.count(head, "round")
    if message == "absence":
        return absence_of(head, tensors, len(data)), round
    measured, stages = tensors.pop(MEASURED, None), heads.names(head, "stages")
    letter = Letter(
        client=client,
        round=round,
        wire=heads.one_of(head, "wire", FORMATS),
        tensors=tensors,
        scales=heads.floats(head, "scales", paths(tensors, ADAPTER, FACTORS)),
        measurements=_measurements(measured, stages, heads.text(head, "why_skipped", LONGEST_TEXT)),
        run=run,
    )
    return letter, round


def absence_of(head: Mapping[str, Any], tensors: Mapping[str, Tensor], size: int) -> Absence:
    """Return the absence of a message of this many bytes."""
    if tensors:
        raise WireError(f"an absence with a tensor, {next(iter(tensors))[:60]!r}; expected none")
    reason, steps = heads.text(head, "reason", LONGEST_TEXT), heads.count(head, "steps")
    return Absence(heads.text(head, "client"), reason, steps, size)


def unpack_assignment(data: bytes, mine: Adapter, run: str = RUN, most_bytes: int | None = None) -> Assignment:
    """Return the assignment of a blob; what did not travel comes from `mine`, the adapter that the client made itself.

    Raises WireError for a damaged or foreign message, and for modules that `mine` does not adapt.
    """
    head, sent = blob.read(data, most_bytes)
    heads.check_common(head, FORMAT, run, ("assignment",))
    wire = Wire(heads.one_of(head, "up", FORMATS), heads.one_of(head, "down", FORMATS))
    tensors = widened(sent, wire.down)
    if odd := [name for name in tensors if not name.startswith((ADAPTER, SIDE, MEMORY))]:
        raise WireError(f"an assignment with a tensor {odd[0][:60]!r}; expected adapter:, side: and memory:")
    known = frozenset(heads.names(head, "known"))
    if wire.down != "fp32":
        tensors = _as_mine(tensors, mine)
    adapter, side = adapter_of(tensors, head, mine, known), side_of(tensors, head)
    check_modules(mine, adapter, side)
    return Assignment(
        client=heads.text(head, "client"),
        round=heads.count(head, "round"),
        adapter=adapter,
        lr=heads.number(head, "lr"),
        first_step=heads.count(head, "first_step"),
        memory={n.removeprefix(MEMORY): t for n, t in tensors.items() if n.startswith(MEMORY)},
        side=side,
        frozen=frozenset(heads.names(head, "frozen")),
        known=known,
        wire=wire,
        last=last_of(head),
    )


def last_of(head: Mapping[str, Any]) -> int:
    """Return the round of a client's last counted update, which is none to come."""
    if (last := heads.count(head, "last")) > heads.count(head, "round"):
        raise WireError(f"its last is {last}, expected at most its round, {head['round']}")
    return last


def check_modules(mine: Adapter, *handed: Adapter) -> None:
    """Raise WireError for a module that is handed out and that the client's own adapter does not have."""
    modules = mine.pairs.keys() | mine.sparse.keys() | mine.extra.keys()
    found = {path for one in handed for path in (*one.pairs, *one.sparse, *one.extra)}
    if strange := sorted(found - modules):
        raise WireError(f"the assignment adapts {strange[0][:200]}, which this client's own adapter does not")


def _as_mine(tensors: Mapping[str, Tensor], mine: Adapter) -> dict[str, Tensor]:
    """Return tensors that were narrowed, in the number formats that the client's own adapter has."""
    had = {ADAPTER + name: t.dtype for name, t in mine.tensors().items() if t.is_floating_point()}
    usual = next(iter(had.values()), torch.float32)  # of tensors in a form that the first adapter did not have

    def dtype(name: str, t: Tensor) -> torch.dtype:
        return had.get(name, usual) if name.startswith(ADAPTER) and t.is_floating_point() else t.dtype

    return {name: t.to(dtype(name, t)) for name, t in tensors.items()}


def adapter_of(
    tensors: Mapping[str, Tensor], head: Mapping[str, Any], mine: Adapter, known: frozenset[str] = frozenset()
) -> Adapter:
    """Return the adapter of an assignment: what was sent, and what this client has of it itself."""
    sent = part_of(tensors, ADAPTER)
    pairs, sparse = paths(tensors, ADAPTER, FACTORS), paths(tensors, ADAPTER, ("values",))
    scales, shapes = heads.floats(head, "scales", pairs), heads.shapes(head, "shapes", sparse)
    whole = set(heads.names(head, "whole"))
    for name, tensor in mine.tensors().items():
        path = name.rpartition("/")[0]
        beside = path in whole or path in (sparse if kind(name) in ("values", "positions") else pairs)
        if {name, kind(name)} & known and beside:
            sent.setdefault(name, tensor)
            if path in mine.pairs:
                scales.setdefault(path, mine.pairs[path].scale)
            elif path in mine.sparse:
                shapes.setdefault(path, mine.sparse[path].shape)
    try:
        adapter = from_tensors(sent, scales, shapes)
    except KeyError as error:
        raise WireError(f"an assignment without {str(error.args[0])[:200]}, which goes with what it has") from None
    if odd := sorted(sent.keys() - adapter.tensors().keys()):
        raise WireError(f"an assignment with a tensor {odd[0][:200]!r}, which belongs to no change of its adapter")
    heads.check_fits(adapter)
    return _in_order(adapter, mine)


def _in_order(adapter: Adapter, mine: Adapter) -> Adapter:
    """Return an adapter with its modules in the order in which the client has them, as the server has them too.

    An order decides floating-point sums, such as a gradient's norm.
    """
    place = {path: i for i, path in enumerate([*mine.pairs, *mine.sparse, *mine.extra])}

    def ordered(parts: Mapping[str, T]) -> dict[str, T]:
        return dict(sorted(parts.items(), key=lambda part: place.get(part[0], len(place))))

    return Adapter(ordered(adapter.pairs), ordered(adapter.extra), ordered(adapter.sparse))


def side_of(tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> Adapter:
    """Return what the base has changed by: factors, and products."""
    sent = part_of(tensors, SIDE)
    if odd := sorted(n for n, t in sent.items() if kind(n) not in ("A", "B", DENSE) or t.dim() != 2):
        raise WireError(f"an assignment with {odd[0][:200]!r} beside the base; expected matrices A and B, or {DENSE}")
    dense = {n.rpartition("/")[0]: from_delta(t) for n, t in sent.items() if kind(n) == DENSE}
    factors = {n: t for n, t in sent.items() if kind(n) != DENSE}
    try:
        side = from_tensors(factors, heads.floats(head, "side_scales", paths(tensors, SIDE, ("A", "B"))))
    except KeyError as error:
        raise WireError(f"an assignment without {str(error.args[0])[:200]} beside the base") from None
    heads.check_fits(side)
    return Adapter({**side.pairs, **dense})


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return one part of a message, without its prefix."""
    return {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}


def _measurements(measured: Tensor | None, stages: list[str], why_skipped: str) -> Measurements:
    """Return an update's measurements; raise WireError for numbers that no training has."""
    numbers = 2 + len(COUNTS) + len(stages)
    if odd := sorted(set(stages) - {stage for known in STAGES.values() for stage in known}):
        raise WireError(f"an update with the seconds of {odd[0][:60]!r}, which no engine has")
    if measured is None or measured.dtype != torch.float64 or measured.shape != (numbers,):
        raise WireError(f"an update without its measurements; expected {MEASURED}, {numbers} numbers in float64")
    total, tokens, *rest = measured.tolist()
    counts, seconds = rest[: len(COUNTS)], rest[len(COUNTS) :]
    if not bool(torch.isfinite(measured).all()) or any(not 0 <= n < 2**53 for n in (tokens, *rest)):
        raise WireError("measurements that are no numbers of at least 0")
    if abs(total) > LARGEST_SUM:
        raise WireError(f"measurements with a loss of {total:g}, which no sum has room for")
    if any(n != int(n) for n in counts):
        raise WireError("measurements that count in fractions")
    counted = dict(zip(COUNTS, map(int, counts), strict=True))
    by_stage = dict(zip(stages, seconds, strict=True))
    return Measurements(loss=Mean(total, tokens), why_skipped=why_skipped, seconds=by_stage, **counted)
