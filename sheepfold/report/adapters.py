"""An adapter's folder without its tensors: base, ranks, targets, sizes, from the configuration and the file's head."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.errors import ModelError
from sheepfold.report.benchmarks import Benchmark, read_benchmarks

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter's folder says of it."""

    path: Path
    base: str | None
    method: str
    """PEFT's name of the kind of adapter"""
    targets: Sequence[str]
    ranks: Mapping[int, int]
    """rank -> how many modules; empty where the file's head does not tell"""
    numbers: int | None
    """Numbers in its tensors; None where the file's head does not tell."""
    file_bytes: int
    weights: Path

    @property
    def rank_text(self) -> str:
        """The ranks in words: '16', or '4 to 16'."""
        return spread(self.ranks) if self.ranks else "not told by the file"

    def sha256(self) -> str:
        """Return the hash of the weights file."""
        with open(self.weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the report of a mere adapter folder shows."""

    files: AdapterFiles
    base: str | None
    """The base that the command line named: there is such a one, and a LoRA adapter fits it."""
    benchmarks: Sequence[Benchmark] = ()


def _check_base(path: Path, base: str) -> None:
    """Raise SheepfoldError where a base is not there, or has not the modules that a LoRA adapter adapts."""
    from sheepfold.answering.source import ADAPTER, find
    from sheepfold.models import config_only
    from sheepfold.peft_io import check_fits

    source = find(path, base=base)
    model = config_only(source.model, "cpu", source.task).model
    if source.is_lora(ADAPTER):
        check_fits(source.adapter(ADAPTER), model)


def spread(ranks: Mapping[int, int]) -> str:
    """Return ranks in words."""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def read_adapter_facts(path: Path, base: str | None = None) -> AdapterFacts:
    """Return what an adapter folder's report shows.

    Raises ModelError where it is none, and where `base` is no base or the adapter does not fit it.
    """
    files = read_adapter(path)
    if files is None:
        raise ModelError(f"{path}: no {CONFIG} with weights beside it; expected a PEFT folder")
    if base is not None:
        _check_base(path, base)
    return AdapterFacts(files, base, read_benchmarks(path / "eval"))


def read_adapter(path: Path) -> AdapterFiles | None:
    """Return what a PEFT folder says; None where it is not one. Raises ModelError for a damaged one."""
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None or not (path / CONFIG).is_file():
        return None
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        shapes = _shapes(weights)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged ({error}); export it again") from None
    targets = config.get("target_modules") or []
    ranks = Counter(shape[0] for name, shape in (shapes or {}).items() if ".lora_A." in name and len(shape) == 2)
    return AdapterFiles(
        path=path,
        base=config.get("base_model_name_or_path"),
        method=str(config.get("peft_type", "unknown")),
        targets=[targets] if isinstance(targets, str) else list(targets),
        ranks=dict(sorted(ranks.items())),
        numbers=None if shapes is None else sum(_product(shape) for shape in shapes.values()),
        file_bytes=weights.stat().st_size,
        weights=weights,
    )


def _shapes(weights: Path) -> dict[str, list[int]] | None:
    """Return the tensors' shapes from a safetensors file's head: 8 bytes of length, then JSON. None for a .bin."""
    if weights.suffix != ".safetensors":
        return None
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > weights.stat().st_size:
            raise ValueError(f"{weights.name} is cut short")
        head = json.loads(file.read(length))
    return {name: tensor["shape"] for name, tensor in head.items() if name != "__metadata__"}


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
