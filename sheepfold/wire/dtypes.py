"""Number formats on the wire: as they are, bfloat16, or int8 with a scale a row.

    int8:   s = max |row| / 127,   q = round(row / s),   row ~ s q   with   |row - s q| <= max |row| / 254

A row lies along the last axis. Of a tall and thin matrix, such as LoRA's B, a row is a column, so that a scale is
shared by many numbers; of a vector, a row is a block of 1,024. What is no floating-point number stays as it is.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sheepfold.errors import WireError
from sheepfold.wire.blob import Spec

Format = Literal["fp32", "bf16", "int8"]
SCALES = "#scales"
"""After a tensor's name: the scales of its rows."""
SHORT = 64
"""A row of a matrix that is shorter than this, and than a column, gives way to the column."""
BLOCK = 1024
TINY = torch.finfo(torch.float32).tiny
"""A row whose scale is below this travels as zeros: it has no number above 2e-36."""


def narrowed(tensors: Mapping[str, Tensor], wire: Format) -> dict[str, Tensor]:
    """Return tensors as they travel in a format. Raises WireError for numbers that are not finite."""
    sent: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if not shrinks(t.dtype, wire):
            sent[name] = t
        elif not bool(torch.isfinite(t).all()):
            raise WireError(f"{name} is not finite, and cannot travel as {wire}")
        elif wire == "bf16":
            sent[name] = t.to(torch.bfloat16)
        else:
            sent[name], sent[name + SCALES] = quantised(t)
    return sent


def widened(tensors: Mapping[str, Tensor], wire: Format) -> dict[str, Tensor]:
    """Return what `narrowed` tensors stand for, in float32 where they were made narrower."""
    if wire == "fp32":
        return dict(tensors)
    found = {}
    for name, t in tensors.items():
        if name.endswith(SCALES):
            continue
        if name + SCALES in tensors:
            t = restored(t, tensors[name + SCALES])
        found[name] = t.float() if t.dtype == torch.bfloat16 else t
    return found


def narrowed_specs(specs: tuple[Spec, ...], wire: Format) -> tuple[Spec, ...]:
    """Return what `narrowed` makes of tensors of these kinds, without making it."""
    made: list[Spec] = []
    for name, dtype, shape in specs:
        if not shrinks(dtype, wire):
            made.append((name, dtype, shape))
        elif wire == "bf16":
            made.append((name, torch.bfloat16, shape))
        else:
            made += [(name, torch.int8, shape), (name + SCALES, torch.float32, (_rows(shape),))]
    return tuple(made)


def shrinks(dtype: torch.dtype, wire: Format) -> bool:
    """Return whether numbers of this format are rounded in that one."""
    return dtype.is_floating_point and wire != "fp32"


def quantised(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor as int8 of its shape, and the scale of each of its rows, (rows,) float32."""
    rows = as_rows(t.detach().cpu().double())
    scales = (rows.abs().amax(1) / 127).float() if rows.numel() else rows.new_zeros(len(rows), dtype=torch.float32)
    scales = torch.where(scales < TINY, 0.0, scales)
    by = torch.where(scales > 0, scales, 1.0).double()[:, None]
    q = torch.where(scales[:, None] > 0, (rows / by).round(), 0.0).clamp(-127, 127).to(torch.int8)
    return from_rows(q, t.shape).contiguous(), scales


def restored(q: Tensor, scales: Tensor) -> Tensor:
    """Return what int8 numbers and the scales of their rows stand for, in float32."""
    return from_rows(as_rows(q).float() * scales.float()[:, None], q.shape).contiguous()


def as_rows(t: Tensor) -> Tensor:
    """Return a tensor's numbers as rows, (rows, length); the last block of a vector is filled up with zeros."""
    if t.dim() < 2:
        flat = t.reshape(-1)
        filled = torch.cat([flat, flat.new_zeros(-len(flat) % BLOCK if len(flat) > BLOCK else 0)])
        return filled.view(-1, min(BLOCK, max(1, len(flat))))
    if _upright(t.shape):
        return t.T
    return t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.reshape(0, 1)


def from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor of this shape that `as_rows` made rows of."""
    if len(shape) < 2:
        return rows.reshape(-1)[: shape.numel()].reshape(shape)
    return rows.T if _upright(shape) else rows.reshape(shape)


def _upright(shape: torch.Size | tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[1] < SHORT and shape[1] < shape[0] and shape[1] > 0


def _rows(shape: tuple[int, ...]) -> int:
    """Return how many rows a tensor of this shape has."""
    numbers = torch.Size(shape).numel()
    if len(shape) < 2:
        return -(-numbers // min(BLOCK, max(1, numbers)))
    if _upright(shape):
        return shape[1]
    return numbers // shape[-1] if shape[-1] else 0
