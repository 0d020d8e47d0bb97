"""Assignment, Letter (an update as it travels) and Absence as bytes, and how many; unpacking.py is the way back.

    adapter:layers.0.q_proj/A     a tensor of the adapter, by its flat name
    side:..., memory:...          what goes beside it
    measured                      an update's measurements, so that its size does not depend on them

What a client makes for itself (`Assignment.known`) or keeps (`Update.unsent`) does not travel: the receiver puts it
back from what it has. A side's pair whose factors are larger than their product travels as that product.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, LoraPair, from_delta, kind
from sheepfold.messages import Absence, Assignment, Measurements, Update
from sheepfold.wire import blob
from sheepfold.wire.blob import Spec
from sheepfold.wire.dtypes import Format, narrowed, narrowed_specs

FORMAT = 1
RUN = "0" * 16
"""The run that messages belong to where they do not leave the process."""
ADAPTER, SIDE, MEMORY, MEASURED = "adapter:", "side:", "memory:", "measured"
DENSE = "dense"
"""The kind of a side's tensor that is a whole product."""
FACTORS = ("A", "B", "core")
KINDS = (*FACTORS, "values", "positions", "extra")
COUNTS = ("rows", "target_tokens", "processed_rows", "processed_tokens", "steps", "skipped_steps")
LONGEST_TEXT = 2000
"""Characters of a reason."""


@dataclass(frozen=True, slots=True)
class Letter:
    """An update as it travels: after the client's side of all transforms, before the server's."""

    client: str
    round: int
    """Rounds completed before it, as in its assignment."""
    wire: Format
    tensors: Mapping[str, Tensor]
    """Narrowed: 'adapter:layers.0.q_proj/A', 'memory:...'"""
    scales: Mapping[str, float]
    """alpha / r of those pairs of which something is sent, by path in order"""
    measurements: Measurements
    run: str = RUN

    @property
    def sent_bytes(self) -> int:
        """Bytes that `pack` makes of it."""
        return blob.size(_letter_head(self), {**self.tensors, MEASURED: _measured(self.measurements)})


def pack(message: Assignment | Letter, run: str = RUN, down: Mapping[str, Tensor] | None = None) -> bytes:
    """Return an assignment's or a letter's bytes; down: an assignment's tensors, where they were narrowed before.

    Raises WireError for numbers that cannot travel.
    """
    if isinstance(message, Letter):
        return blob.write(_letter_head(message), {**message.tensors, MEASURED: _measured(message.measurements)})
    sent = narrowed(going_down(message), message.wire.down) if down is None else down
    return blob.write(_assignment_head(message, run), sent)


def pack_absence(absence: Absence, round: int, run: str = RUN) -> bytes:
    """Return an absence's bytes."""
    return blob.write(_absence_head(absence, round, run), {})


def absence_bytes(absence: Absence, round: int) -> int:
    """Return how many these are."""
    return blob.size(_absence_head(absence, round, RUN), ())


def sent_bytes(message: Assignment | Update | Absence, wire: Format = "fp32", round: int = 0) -> int:
    """Return the bytes that a message takes, or did take; wire and round: of an update that has not travelled."""
    if isinstance(message, Assignment):
        return blob.size(_assignment_head(message, RUN), narrowed_specs(_specs_down(message), message.wire.down))
    if message.sent_bytes is not None:
        return message.sent_bytes
    tensors = going_up(message)
    scales = scales_of(message.adapter, tensors)
    head = _letter_head(Letter(message.client, round, wire, {}, scales, message.measurements))
    return blob.size(
        head, (*narrowed_specs(_specs(tensors), wire), *_specs({MEASURED: _measured(message.measurements)}))
    )


def going_down(assignment: Assignment) -> dict[str, Tensor]:
    """Return what of an assignment travels, before it is narrowed."""
    sent = {ADAPTER + name: t for name, t in assignment.sent().items()}
    return sent | side_down(assignment.side) | {MEMORY + name: t for name, t in assignment.memory.items()}


def side_down(side: Adapter) -> dict[str, Tensor]:
    """Return what of a side travels: factors, or their product where that is smaller."""
    sent: dict[str, Tensor] = {}
    for path, pair in sorted(side.pairs.items()):
        if as_factors(pair):
            sent |= {f"{SIDE}{path}/A": pair.A, f"{SIDE}{path}/B": pair.B}
        else:
            sent[f"{SIDE}{path}/{DENSE}"] = pair.delta().to(pair.A.dtype)
    return sent


def going_up(update: Update) -> dict[str, Tensor]:
    """Return what of an update travels, before any transform."""
    sent = {ADAPTER + name: t for name, t in update.sent().items()}
    return sent | {MEMORY + name: t for name, t in update.memory.items()}


def as_factors(pair: LoraPair) -> bool:
    """Return whether a side's pair travels as its factors, which are smaller than their product."""
    return pair.A.numel() + pair.B.numel() < pair.B.shape[0] * pair.A.shape[1]


def compact(side: Adapter) -> Adapter:
    """Return a side in the form in which it arrives, so that clients train beside the same bits everywhere."""
    pairs = {path: pair if as_factors(pair) or _whole(pair) else _product(pair) for path, pair in side.pairs.items()}
    return Adapter(pairs) if any(pairs[path] is not pair for path, pair in side.pairs.items()) else side


def _product(pair: LoraPair) -> LoraPair:
    return from_delta(pair.delta().to(pair.A.dtype))


def _whole(pair: LoraPair) -> bool:
    """Return whether a pair is what `from_delta` makes of its product."""
    eye = pair.B if pair.B.shape[0] <= pair.A.shape[1] else pair.A
    square = eye.shape[0] == eye.shape[1] and pair.scale == 1.0
    return square and torch.equal(eye, torch.eye(len(eye), dtype=eye.dtype, device=eye.device))


def scales_of(adapter: Adapter, sent: Iterable[str]) -> dict[str, float]:
    """Return the scales of those pairs of which something is sent, by path in order."""
    return {path: adapter.pairs[path].scale for path in paths(sent, ADAPTER, FACTORS)}


def paths(names: Iterable[str], part: str, kinds: Sequence[str]) -> list[str]:
    """Return the module paths, in order, of which a part of a message has tensors of these kinds."""
    found = (name.removeprefix(part) for name in names if name.startswith(part) and kind(name) in kinds)
    return sorted({name.rpartition("/")[0] for name in found})


def _specs_down(assignment: Assignment) -> tuple[Spec, ...]:
    """Return the names, formats and shapes of `going_down`, without multiplying a side out."""
    sent = {ADAPTER + name: t for name, t in assignment.sent().items()}
    specs = [*_specs(sent), *_specs({MEMORY + name: t for name, t in assignment.memory.items()})]
    for path, pair in assignment.side.pairs.items():
        if as_factors(pair):
            specs += _specs({f"{SIDE}{path}/A": pair.A, f"{SIDE}{path}/B": pair.B})
        else:
            specs.append((f"{SIDE}{path}/{DENSE}", pair.A.dtype, (pair.B.shape[0], pair.A.shape[1])))
    return tuple(specs)


def _specs(tensors: Mapping[str, Tensor]) -> tuple[Spec, ...]:
    return tuple((name, t.dtype, tuple(t.shape)) for name, t in tensors.items())


def _assignment_head(a: Assignment, run: str) -> dict[str, Any]:
    sent = [ADAPTER + name for name in a.sent()]
    side = [pair.scale for _, pair in sorted(a.side.pairs.items()) if as_factors(pair)]
    return common("assignment", run, a.client, a.round) | {
        "up": a.wire.up,
        "down": a.wire.down,
        "lr": a.lr,
        "first_step": a.first_step,
        "last": a.last,
        "frozen": sorted(a.frozen),
        "known": sorted(a.known),
        "whole": _all_known(a, sent),
        "scales": short(list(scales_of(a.adapter, sent).values())),
        "shapes": [list(a.adapter.sparse[path].shape) for path in paths(sent, ADAPTER, ("values",))],
        "side_scales": short(side),
    }


def _all_known(a: Assignment, sent: Sequence[str]) -> list[str]:
    """Return the modules, in order, of which nothing travels, since the client has all of it."""
    return sorted({name.rpartition("/")[0] for name in a.adapter.tensors()} - set(paths(sent, ADAPTER, KINDS)))


def _letter_head(letter: Letter) -> dict[str, Any]:
    return common("update", letter.run, letter.client, letter.round) | {
        "wire": letter.wire,
        "scales": short(list(letter.scales.values())),
        "stages": sorted(letter.measurements.seconds),
        "why_skipped": letter.measurements.why_skipped[:LONGEST_TEXT],
    }


def _absence_head(absence: Absence, round: int, run: str) -> dict[str, Any]:
    return common("absence", run, absence.client, round) | {
        "reason": absence.reason[:LONGEST_TEXT],
        "steps": absence.steps,
    }


def common(message: str, run: str, client: str, round: int) -> dict[str, Any]:
    """Return what every message's head has."""
    return {"format": FORMAT, "message": message, "run": run, "client": client, "round": round}


def short(scales: list[float]) -> list[float]:
    """Return the scales, as one where all are the same."""
    return scales[:1] if len(set(scales)) == 1 else scales


def _measured(m: Measurements) -> Tensor:
    """Return measurements as numbers: the loss, what was counted, and the seconds of each stage by its name."""
    seconds = [m.seconds[stage] for stage in sorted(m.seconds)]
    counts = [float(getattr(m, name)) for name in COUNTS]
    return torch.tensor([m.loss.total, m.loss.count, *counts, *seconds], dtype=torch.float64)
