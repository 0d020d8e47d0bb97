"""Emulator folders: an ordinary model of fewer layers, which is all that a client gets.

    config.json, *.safetensors, the tokenizer's files    loads by any tool as the smaller model that it is
    offsite.json                                         which layers these are, what is trained, a hash of every tensor
    README.md                                            the same for people

The full model's name, place and other weights are in none of them.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepfold.card import stated_license
from sheepfold.config import Experiment
from sheepfold.deltas import Reader, Weights
from sheepfold.errors import CheckpointError
from sheepfold.folders import fresh_folder
from sheepfold.layers import keep_layers
from sheepfold.loading import quiet
from sheepfold.models import Base, config_only, load_base
from sheepfold.offsite.align import AlignRows, align
from sheepfold.offsite.cut import KEY, Cut, cut_of
from sheepfold.offsite.settings import OffsiteSettings

FILE, FORMAT = "offsite.json", 1


@dataclass(frozen=True, slots=True)
class Emulator:
    """What an emulator's folder says of itself."""

    folder: Path
    cut: Cut
    parameters: int
    full_parameters: int
    """Of the model that it stands for"""
    aligned: dict[str, Any] | None
    """Steps, rows and losses, where its middle was aligned"""
    tensors: dict[str, str]
    """name -> SHA-256 of shape, dtype and bits"""

    def as_dict(self) -> dict[str, Any]:
        """Return what offsite.json holds."""
        return {
            "format": FORMAT, "cut": self.cut.as_dict(), "parameters": self.parameters,
            "full_parameters": self.full_parameters, "aligned": self.aligned, "tensors": self.tensors,
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Return what the journal says of it; bytes: of its weights, which every client gets once."""
        share = self.parameters / self.full_parameters
        size = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        layers = {"layers": list(self.cut.source), "of": self.cut.total}
        return {**layers, "share": share, "bytes": size, "aligned": self.aligned}

    def line(self) -> str:
        """Return what it holds, in one line."""
        cut = self.cut
        ends = _listed(cut.source[i] for i in cut.adapter_layers)
        groups = [f"layers {ends}" if group == "layers" else group for group in cut.train]
        learned = ""
        if self.aligned:
            kd = [self.aligned[when]["kd"] for when in ("before", "after")]
            learned = f"; aligned in {self.aligned['steps']} steps, distance {kd[0]:.4f} -> {kd[1]:.4f}"
        return (
            f"layers {_listed(cut.source)} of {cut.total}; {self.parameters:,} parameters, "
            f"{self.parameters / self.full_parameters:.0%} of {self.full_parameters:,}; to train: "
            f"{', '.join(groups)}{learned}"
        )


def write(experiment: Experiment, out: str | os.PathLike[str], tokenizer: Any, rows: AlignRows | None) -> Emulator:
    """Write the emulator of an experiment's model.base as a new folder; rows: what its middle is aligned on.

    Weights keep the dtype that the base was published in where nothing is lost by it. Raises SheepfoldError, in one
    line, for what cannot be cut, aligned or written.
    """
    with fresh_folder(out) as fresh:
        base, small, made = _made(experiment, Path(out), tokenizer, rows)
        _save(small, made.cut, base, experiment, fresh)
        made = replace(made, tensors=hashes(fresh))
        (fresh / FILE).write_text(json.dumps(made.as_dict(), indent=1) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(_readme(made, experiment), encoding="utf-8")
    return made


def _made(experiment: Experiment, folder: Path, tokenizer: Any, rows: AlignRows | None) -> tuple[Base, Any, Emulator]:
    """Return the full model, its emulator, aligned where that was asked for, and what can be said of it."""
    asked, settings = experiment.offsite, experiment.model
    assert asked is not None
    if settings.dtype != "float64":  # narrow numbers would round an alignment's steps away, or what was published
        settings = settings.model_copy(update={"dtype": "float32"})
    base = load_base(settings, experiment.device if asked.align else "cpu", tokenizer)
    full: Any = base.model
    cut = cut_of(full, asked)
    small = _smaller(full, cut, own_middle=asked.align is not None)
    aligned = align(full, small, cut, rows, asked.align) if asked.align is not None and rows is not None else None
    return base, small, Emulator(folder, cut, _count(small), _count(full), aligned, {})


def outlined(full: Any, asked: OffsiteSettings) -> Any:
    """Return the emulator of a model on the meta device, which stays as it is.

    Raises ConfigError or ModelError for a cut that cannot be, before any weight is loaded.
    """
    small: Any = copy.deepcopy(full)
    cut = cut_of(small, asked)
    keep_layers(small, cut.source, cut.layers)
    setattr(small.config, KEY, cut.as_dict())
    return small


def read(folder: Path) -> Emulator:
    """Return an emulator's folder. Raises CheckpointError where it is none."""
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        cut = Cut.of(told["cut"])
        return Emulator(
            folder, cut, told["parameters"], told["full_parameters"], told["aligned"], dict(told["tensors"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / FILE}: cannot be read ({error!r}); write the emulator again") from None


def check(folder: Path) -> Emulator:
    """Return an emulator's folder whose every tensor is what it was. Raises CheckpointError where one is not."""
    made = read(folder)
    found = hashes(folder)
    if odd := sorted(name for name in found.keys() | made.tensors.keys() if found.get(name) != made.tensors.get(name)):
        raise CheckpointError(f"{folder}: {odd[0]} is not what was written; restore the folder, or start a new run")
    return made


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every tensor in a model's folder, by name."""
    weights = Weights.of(folder)
    reader = Reader(weights)
    return {name: tensor_hash(reader[name]) for name in sorted(weights.files)}


def tensor_hash(tensor: Tensor) -> str:
    """Return a SHA-256 of a tensor's shape, dtype and bits."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)}:{tensor.dtype};".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _smaller(full: Any, cut: Cut, *, own_middle: bool) -> Any:
    """Return the emulator: modules of its own, whose numbers are the full model's; own_middle: but for the middle's."""
    middle = [full.get_submodule(cut.layers)[i] for i in cut.source[cut.bottom : len(cut.source) - cut.top]]
    own = {id(p) for block in middle for p in block.parameters()} if own_middle else set()
    shared = {id(p): p for p in full.parameters() if id(p) not in own}
    small = copy.deepcopy(full, shared)
    keep_layers(small, cut.source, cut.layers)
    setattr(small.config, KEY, cut.as_dict())
    return small


def _narrowest(base: Base, published: Any) -> torch.dtype:
    """Return the dtype that the base was published in, if its numbers are still such, else the one they have."""
    if not isinstance(published, torch.dtype) or published.itemsize >= base.dtype.itemsize:
        return base.dtype
    exact = all(torch.equal(p, p.to(published).to(p.dtype)) for p in base.model.parameters())
    return published if exact else base.dtype


def _save(small: Any, cut: Cut, base: Base, experiment: Experiment, folder: Path) -> None:
    outline: Any = config_only(experiment.model).model
    dtype = _narrowest(base, outline.config.dtype)
    small.to(dtype)  # not tensor by tensor: tied ones stay one; the full model, which shares them, is done with
    with quiet():
        small.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), **base.dropout, KEY: cut.as_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _readme(made: Emulator, experiment: Experiment) -> str:
    cut, model = made.cut, experiment.model
    licence = experiment.card.base_license or stated_license(model.base, model.revision) or "not stated"
    return f"""# An emulator for offsite-tuning

{made.line()}.

It stands for a model that its owner keeps. Trained are its {", ".join(cut.train)}; its adapter layers are
{", ".join(map(str, cut.adapter_layers))}, as it counts. What is learned there fits the full model.

It loads like any model. sheepfold, with `model.base` set to this folder, trains what is named above and nothing else.
`{FILE}` holds a hash of every tensor. Licence of the full model: {licence}.
"""
