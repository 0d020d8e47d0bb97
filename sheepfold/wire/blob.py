"""The container: a JSON head and tensors as one run of bytes, which any safetensors library reads too.

    8 bytes: length of the header │ {"__metadata__": {"sheepfold": head}, name: {dtype, shape, place}, ...} │ numbers

Reading is strict and costs nothing before it is sure: sizes are compared with what was declared and with what the
receiver allows before a byte is parsed; names come once, places follow each other without a gap, and the numbers hash
to what the head says. Tensors are views into the bytes that came.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from sheepfold.errors import WireError

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Names of number formats, as safetensors has them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MOST_HEADER = 32 * 2**20
"""Bytes of a header at most: room for 100,000 tensors."""

Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""(name, number format, shape) of a tensor."""
HASH = "0" * 64


def write(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return head and tensors as bytes; a SHA-256 of the numbers is added to the head."""
    placed = _placed(_specs(tensors))
    total = sum(size for _, size in placed)
    body = bytearray(total)
    at = 0
    for (name, _, _), size in placed:
        if size:
            numbers = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            memoryview(body)[at : at + size] = memoryview(numbers.numpy())  # type: ignore[arg-type]
        at += size
    header = _header({**head, "hash": hashlib.sha256(body).hexdigest()}, tuple(spec for spec, _ in placed))
    return b"".join((struct.pack("<Q", len(header)), header, body))


def size(head: Mapping[str, Any], specs: Mapping[str, Tensor] | tuple[Spec, ...]) -> int:
    """Return how many bytes `write` makes of this head and tensors of these kinds, without making them."""
    placed = _placed(specs if isinstance(specs, tuple) else _specs(specs))
    ordered = tuple(spec for spec, _ in placed)
    return 8 + _padded(len(_start(head)) + len(_table(ordered))) + sum(size for _, size in placed)


def read(data: bytes, most_bytes: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a blob's head and its tensors. Raises WireError for anything that `write` would not have written.

    most_bytes: what the receiver allows; None: as many as came.
    """
    header, body = _parts(data, most_bytes)
    table = _parsed(header)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("sheepfold"), str):
        _refuse("it has no sheepfold head; it was written by another program")
    head = _parsed(metadata["sheepfold"].encode())
    tensors = _tensors(table, body)
    if head.get("hash") != hashlib.sha256(body).hexdigest():
        _refuse("its numbers are not those that were written; it was damaged on the way")
    return head, tensors


def _parts(data: bytes, most_bytes: int | None) -> tuple[bytes, memoryview]:
    """Return header and numbers, after their sizes were found to be possible."""
    if most_bytes is not None and len(data) > most_bytes:
        _refuse(f"it has {len(data):,} bytes, expected at most {most_bytes:,}")
    if len(data) < 8:
        _refuse(f"it ends after {len(data)} bytes, in the length of its header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MOST_HEADER:
        _refuse(f"its header claims {length:,} bytes, expected at most {MOST_HEADER:,}")
    if length > len(data) - 8:
        _refuse(f"it is truncated: its header claims {length:,} bytes, and {len(data) - 8:,} are there")
    return bytes(data[8 : 8 + length]), memoryview(data)[8 + length :]


def _parsed(text: bytes) -> dict[str, Any]:
    """Return a JSON mapping in which every name comes once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            _refuse(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        _refuse(f"its header is not JSON ({str(error).splitlines()[0]})")
    if not isinstance(value, dict):
        _refuse(f"its header is a {type(value).__name__}, expected a mapping")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _tensors(table: Mapping[str, Any], body: memoryview) -> dict[str, Tensor]:
    """Return the tensors that the header places, which lie one after another from the first number to the last."""
    found: dict[str, Tensor] = {}
    at = 0
    for name, entry in table.items():
        dtype, shape = _declared(name, entry)
        numbers = 1
        for side in shape:
            numbers *= side
        end = at + numbers * dtype.itemsize
        if entry["data_offsets"] != [at, end]:
            _refuse(f"{name}: placed at {str(entry['data_offsets'])[:60]}, expected [{at}, {end}]")
        if end > len(body):
            _refuse(f"it is truncated: {name} ends at {end:,}, and {len(body):,} bytes of numbers are there")
        found[name] = _view(body, at, numbers, dtype).view(shape)
        at = end
    if at != len(body):
        _refuse(f"{len(body) - at:,} bytes follow after its last tensor")
    return found


def _declared(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(f"{name}: expected dtype, shape and data_offsets, found {str(entry)[:60]}")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(f"{name}: number format {str(dtype)[:20]!r}; known: {', '.join(DTYPES)}")
    sides = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not sides:
        _refuse(f"{name}: shape {str(shape)[:60]} is none")
    return DTYPES[dtype], tuple(shape)


def _view(body: memoryview, at: int, numbers: int, dtype: torch.dtype) -> Tensor:
    if not numbers:
        return torch.empty(0, dtype=dtype)
    part = body[at : at + numbers * dtype.itemsize]
    # a copy that is the receiver's own: bytes may not be written to, and a header's length may misplace them
    return torch.frombuffer(bytearray(part), dtype=dtype)


def _specs(tensors: Mapping[str, Tensor]) -> tuple[Spec, ...]:
    return tuple((name, t.dtype, tuple(t.shape)) for name, t in tensors.items())


@lru_cache(maxsize=64)
def _placed(specs: tuple[Spec, ...]) -> tuple[tuple[Spec, int], ...]:
    """Return specs and their bytes in the order of the numbers: the widest first, so that all lie where they should."""
    ordered = sorted(specs, key=lambda spec: (-spec[1].itemsize, spec[0]))
    return tuple((spec, torch.Size(spec[2]).numel() * spec[1].itemsize) for spec in ordered)


@lru_cache(maxsize=64)
def _table(specs: tuple[Spec, ...]) -> str:
    """Return the header's entries of these tensors, and its end."""
    parts, at = [], 0
    for (name, dtype, shape), size in _placed(specs):
        entry = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (at, at + size)}
        parts.append(f",{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}")
        at += size
    return "".join(parts) + "}"


def _start(head: Mapping[str, Any]) -> str:
    text = json.dumps({**head, "hash": head.get("hash", HASH)}, separators=(",", ":"), allow_nan=False)
    return f'{{"__metadata__":{json.dumps({"sheepfold": text}, separators=(",", ":"))}'


def _header(head: Mapping[str, Any], specs: tuple[Spec, ...]) -> bytes:
    text = _start(head) + _table(specs)
    return text.encode().ljust(_padded(len(text)))


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def _refuse(why: str) -> NoReturn:
    raise WireError(f"not a message of ours: {why}")
