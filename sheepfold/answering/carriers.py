"""How named adapters get onto one base: LoRA row by row, any other method one at a time.

A carrier's `using(names)` yields a transformers model in which row i of a batch answers under names[i].
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.answering.source import BASE, Source
from sheepfold.engines.injection import CohortModel, Selection
from sheepfold.engines.stack import Stack, stacked
from sheepfold.errors import AdapterMismatch, CheckpointError, ModelError
from sheepfold.loading import quiet
from sheepfold.models import Base, load_base
from sheepfold.peft_io import check_fits
from sheepfold.quantised import hush

MOST_STACKS = 4
"""Combinations of adapters kept on the device."""


class Carrier(Protocol):
    """One base, and adapters that answer by name."""

    mixes: bool
    """Whether rows of one batch may answer under different names."""

    def using(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Any]:
        """Yield the model in which row i answers under names[i]; one name: every row."""

    def close(self) -> None:
        """Give the base back as it was."""


def carrier(source: Source, base: Base) -> Carrier:
    """Return what carries the source's adapters. Raises ModelError or AdapterMismatch where they are not the base's."""
    if source.names == (BASE,):
        return Bare(base)
    if source.is_full:
        return Whole(source, base)
    if source.is_lora(source.default) and not _adapts_head(source.adapter(source.default), base):
        return Lora(source, base)
    return Peft(source, base)


def _adapts_head(adapter: Adapter, base: Base) -> bool:
    model: Any = base.model
    head = model.get_output_embeddings()
    return any(module is head for name, module in model.named_modules() if name in adapter.plain().pairs)


class Bare:
    """A base without adapters."""

    mixes = True

    def __init__(self, base: Base) -> None:
        self.model: Any = base.model

    @contextlib.contextmanager
    def using(self, names: Sequence[str]) -> Iterator[Any]:
        yield self.model

    def close(self) -> None:
        """Nothing was changed."""


class Lora:
    """LoRA adapters, any of them in one batch; each is read when it is first asked for."""

    mixes = True

    def __init__(self, source: Source, base: Base) -> None:
        self.source, self.base = source, base
        first = source.adapter(source.default).plain()
        check_fits(first, base.model)
        layers = dict(base.model.named_modules())
        self.cohort = CohortModel(base.model, {path: layers[path] for path in first.pairs})
        self._blank = {path: _zeros(pair) for path, pair in first.pairs.items()}
        self._stacks: dict[tuple[str, ...], Stack] = {}

    @contextlib.contextmanager
    def using(self, names: Sequence[str]) -> Iterator[Any]:
        kinds = tuple(sorted(set(names)))
        if kinds == (BASE,):
            yield self.cohort.model
            return
        index = torch.tensor([kinds.index(name) for name in names], device=self.base.device)
        with self.cohort.using(Selection(self._stack(kinds), index)):
            yield self.cohort.model

    def _stack(self, kinds: tuple[str, ...]) -> Stack:
        if kinds in self._stacks:
            self._stacks[kinds] = self._stacks.pop(kinds)  # the least recently asked goes first
        else:
            while len(self._stacks) >= MOST_STACKS:
                self._stacks.pop(next(iter(self._stacks)))
            made = stacked([self._adapter(name) for name in kinds], self.base.device, grad=False)
            self._stacks[kinds] = made
        return self._stacks[kinds]

    def _adapter(self, name: str) -> Adapter:
        """Return an adapter at all sites, zeros where it has nothing."""
        own = {} if name == BASE else self.source.adapter(name).plain().pairs
        if odd := sorted(own.keys() - self._blank.keys()):
            raise AdapterMismatch(f"{odd[0]}: adapted by {name} and not by {self.source.default}")
        return Adapter(self._blank | dict(own))

    def close(self) -> None:
        self.cohort.close()


def _zeros(like: LoraPair) -> LoraPair:
    return LoraPair(torch.zeros(1, like.A.shape[1]), torch.zeros(like.B.shape[0], 1), 1.0)


def _check_folder(source: Source, folder: Path) -> None:
    if source.run is not None and not folder.is_dir():
        raise CheckpointError(f"{folder}: not there yet; it is written when the run ends")
    if source.run is None and (folder.is_file() or source.adapter_config is not None):
        raise ModelError(f"{folder}: no LoRA, and other methods are read as whole folders; give the PEFT folder")


class Peft:
    """Adapters of any PEFT method, loaded by PEFT from their folders; a batch answers under one name."""

    mixes = False

    def __init__(self, source: Source, base: Base) -> None:
        self.source = source
        self.model: Any = base.model
        self._loaded: dict[str, str] = {}
        self._activate(source.default)

    @contextlib.contextmanager
    def using(self, names: Sequence[str]) -> Iterator[Any]:
        (name,) = set(names)
        if name != BASE:
            self._activate(name)
            yield self.model
            return
        with self.model.disable_adapter():
            yield self.model

    def _activate(self, name: str) -> None:
        if name not in self._loaded:
            self._load(name)
        self.model.set_adapter(self._loaded[name])
        self.model.requires_grad_(False).eval()

    def _load(self, name: str) -> None:
        hush()
        from peft import PeftModel

        folder, known = self.source.place(name), f"a{len(self._loaded)}"
        _check_folder(self.source, folder)
        with quiet():
            if self._loaded:
                self.model.load_adapter(str(folder), adapter_name=known)
            else:
                self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=known)
        self._loaded[name] = known

    def close(self) -> None:
        self.model = self.model.unload() if hasattr(self.model, "unload") else self.model


class Whole:
    """Runs that trained all weights: an adapter is a model of its own, and one of them is in memory beside the base."""

    mixes = False

    def __init__(self, source: Source, base: Base) -> None:
        self.source, self.base = source, base
        self._name = BASE
        self._model: Any = base.model

    @contextlib.contextmanager
    def using(self, names: Sequence[str]) -> Iterator[Any]:
        (name,) = set(names)
        if name == BASE:
            yield self.base.model
            return
        if name != self._name:
            folder = self.source.place(name)
            _check_folder(self.source, folder)
            settings = self.source.model.model_copy(update={"base": str(folder), "revision": None})
            self._name, self._model = BASE, self.base.model  # never three in memory
            self._model = load_base(settings, str(self.base.device), self.base.tokenizer, self.base.bits or 0).model
            self._name = name
        yield self._model

    def close(self) -> None:
        self._model = self.base.model
