"""Weights shipped as a difference: target = base + delta, tensor by tensor, as Vicuna was published.

Shards are streamed: one shard of the delta is added to the base's tensors and written before the next is read, so
memory stays near one shard. Sums are taken in float32 (float64 where a side is) and stored in the delta's dtype, which
for float16 gives the bits that float16 addition gives.

Where the delta has more vocabulary than the base (Vicuna v0 added a pad token), its further rows are taken as they are:
FastChat resizes the base's embeddings with zeros before it adds (fastchat/model/apply_delta.py, make_delta.py).
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sheepfold.errors import ModelError
from sheepfold.folders import fresh_folder

FORMATS = ("model.safetensors", "pytorch_model.bin")
KEPT = (".json", ".model", ".txt", ".jinja")
"""Configuration and tokenizer files, by suffix: what is copied beside the new weights."""
BUFFER = "rotary_emb.inv_freq"
"""A buffer that old LLaMA files hold and transformers computes: not a weight."""


def apply_delta(base: str | os.PathLike[str], delta: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write base + delta as a new model folder: safetensors shards, with the delta's configuration and tokenizer.

    Raises ModelError for folders without weights, tensors that one side lacks, and shapes that differ; CheckpointError
    for a target that is there and not empty. The target is whole or absent.
    """
    _combine(Weights.of(base), Weights.of(delta), target, lambda ours, theirs: theirs + ours)


def make_delta(base: str | os.PathLike[str], tuned: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write tuned - base as a new folder, which `apply_delta` turns back into the tuned model (up to rounding)."""
    _combine(Weights.of(base), Weights.of(tuned), target, lambda ours, theirs: theirs - ours)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model folder's tensors, by name, in the files that hold them."""

    folder: Path
    files: Mapping[str, Path]
    """tensor name -> file"""
    rows: int | None
    """The configuration's vocab_size."""

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> "Weights":
        """Return a folder's weights, safetensors before .bin; raise ModelError where there are none."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; give one with config.json and weights (download it first)")
        rows = _json(folder / "config.json").get("vocab_size")
        for name in FORMATS:
            if (index := folder / f"{name}.index.json").is_file():
                files = {tensor: folder / file for tensor, file in _json(index).get("weight_map", {}).items()}
            elif (folder / name).is_file():
                files = dict.fromkeys(_open(folder / name).names, folder / name)
            else:
                continue
            if missing := sorted({str(f) for f in files.values() if not f.is_file()}):
                raise ModelError(f"{missing[0]}: the index names it, and it is not there; download it again")
            return cls(folder, {n: f for n, f in files.items() if not n.endswith(BUFFER)}, rows)
        raise ModelError(f"{folder}: no weights; expected {' or '.join(FORMATS)}, or their shards with an index")

    def shards(self) -> dict[Path, list[str]]:
        """Return the names in every file, in the files' order."""
        shards: dict[Path, list[str]] = {}
        for name in sorted(self.files):
            shards.setdefault(self.files[name], []).append(name)
        return dict(sorted(shards.items()))


@dataclass(frozen=True, slots=True)
class Shard:
    """One open weights file."""

    names: list[str]
    get: Callable[[str], Tensor]


class Reader:
    """Reads tensors of one folder, keeping one file open at a time."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._open: tuple[Path, Shard] | None = None

    def __getitem__(self, name: str) -> Tensor:
        path = self.weights.files[name]
        if self._open is None or self._open[0] != path:
            self._open = path, _open(path)
        try:
            return self._open[1].get(name)
        except (KeyError, SafetensorError):
            raise ModelError(f"{path}: {name} should be in it and is not; download it again") from None


def _combine(
    base: Weights, other: Weights, target: str | os.PathLike[str], join: Callable[[Tensor, Tensor], Tensor]
) -> None:
    _check_names(base, other)
    ours, theirs, index, size = Reader(base), Reader(other), dict[str, str](), 0
    shards = other.shards()
    with fresh_folder(target) as fresh:
        for number, names in enumerate(shards.values(), start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else FORMATS[0]
            names.sort(key=lambda name: base.files[name])  # so that each file of the base is opened once a shard
            tensors = {name: _joined(name, ours, theirs, join) for name in names}
            save_file(tensors, fresh / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
            size += sum(t.numel() * t.element_size() for t in tensors.values())
            del tensors  # before the next shard comes
        if len(shards) > 1:
            listing = {"metadata": {"total_size": size}, "weight_map": index}
            (fresh / f"{FORMATS[0]}.index.json").write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
        for path in other.folder.iterdir():
            if path.is_file() and path.suffix in KEPT and not path.name.endswith(".index.json"):
                shutil.copyfile(path, fresh / path.name)


def _joined(name: str, ours: Reader, theirs: Reader, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return one tensor of the result, in the dtype of `theirs`."""
    base, other = ours[name], theirs[name]
    if not other.is_floating_point():
        return base.clone()  # a mask or a table, the same on both sides
    wide = torch.promote_types(torch.promote_types(base.dtype, other.dtype), torch.float32)
    if base.shape == other.shape:
        return join(base.to(wide), other.to(wide)).to(other.dtype)
    rows = (ours.weights.rows, theirs.weights.rows)
    grown = base.shape[1:] == other.shape[1:] and rows == (len(base), len(other)) and len(base) < len(other)
    if not grown:
        raise ModelError(
            f"{theirs.weights.folder}: {name} is {tuple(other.shape)}, in the base {tuple(base.shape)}; it belongs to "
            "another base (only the vocabulary may have grown)"
        )
    known = join(base.to(wide), other[: len(base)].to(wide)).to(other.dtype)
    return torch.cat([known, other[len(base) :]])


def _check_names(base: Weights, other: Weights) -> None:
    odd = sorted(base.files.keys() ^ other.files.keys())
    if odd:
        place, lacks = (base, other) if odd[0] in base.files else (other, base)
        raise ModelError(
            f"{lacks.folder}: {odd[0]} is missing, and {place.folder} has it ({len(odd)} such tensors); "
            "these two folders do not belong together"
        )


def _open(path: Path) -> Shard:
    """Return one weights file, mapped rather than read (but for torch's format from before zip archives)."""
    try:
        if path.suffix == ".safetensors":
            file: Any = safe_open(path, framework="pt")
            return Shard(list(file.keys()), file.get_tensor)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return Shard(list(state), state.__getitem__)
    except pickle.UnpicklingError:
        raise ModelError(f"{path}: holds more than tensors, and unpickling that could run code: refused") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: damaged or cut short ({line}); download it again") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ModelError(f"{path}: missing, or not JSON; expected a transformers model folder") from None
