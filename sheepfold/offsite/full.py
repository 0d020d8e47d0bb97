"""The owner's side of a run: the full model, which judges and takes home what was learned on the emulator."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sheepfold.adapter import Adapter
from sheepfold.config import Experiment, GenerationSettings, ModelSettings
from sheepfold.engines.common import Work
from sheepfold.metrics import Score
from sheepfold.models import Base, Outline, config_only, fingerprint, load_base
from sheepfold.offsite import align, emulator
from sheepfold.offsite.emulator import Emulator
from sheepfold.offsite.plug import plug

if TYPE_CHECKING:
    from sheepfold.assembly import AnyEngine, Foundation, Parts


def of_emulator(experiment: Experiment, known: "Foundation") -> "Foundation":
    """Return what is known of a run whose clients get an emulator: its outline, and the rows that it is aligned on.

    Raises ConfigError, ModelError or DataError for a cut or rows that cannot be.
    """
    assert experiment.offsite is not None
    small = emulator.outlined(known.outline.model, experiment.offsite)
    rows = align.read_rows(experiment, known.tokenizer)
    if rows is not None:
        align.check_apart(rows, known.data)
    parameters = sum(p.numel() for p in small.parameters())
    return replace(known, outline=replace(known.outline, model=small, parameters=parameters), full=known.outline,
                   align=rows)  # fmt: skip


def written(experiment: Experiment, known: "Foundation", folder: Path) -> Emulator:
    """Return the run's emulator: what its folder holds already, checked tensor by tensor, else a new one."""
    if folder.is_dir():
        return emulator.check(folder)
    made = emulator.write(experiment, folder, known.tokenizer, known.align)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the full model was there
    return made


class Closed:
    """The full model of a run whose clients have an emulator; it is loaded when it is first needed."""

    def __init__(self, experiment: Experiment, made: Emulator, engine_on: Callable[[Base], "AnyEngine"]) -> None:
        self.emulator = made
        self.fingerprint = fingerprint(experiment.model)
        self._experiment = experiment
        self._engine_on = engine_on

    @cached_property
    def outline(self) -> Outline:
        """The full model's names and shapes."""
        return config_only(self._experiment.model, self._experiment.device)

    @cached_property
    def base(self) -> Base:
        """The full model."""
        return load_base(self._experiment.model, self._experiment.device)

    @cached_property
    def engine(self) -> "AnyEngine":
        """The full model with the same places for adapters as the emulator; it evaluates and never trains."""
        return self._engine_on(self.base)

    def plug(self, adapter: Adapter) -> Adapter:
        """Return an emulator's adapter under the full model's names. Raises AdapterMismatch for one without a place."""
        model = self.outline.model
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        return plug(adapter, self.emulator.cut, names)

    def judging(self, parts: "Parts") -> "Parts":
        """Return the run's parts with the full model to evaluate on."""
        engine: Any = Judge(self, parts.engine)
        return replace(parts, engine=engine)

    def judges(self, parts: "Parts") -> list["Parts"]:
        """Return the parts that offsite.evaluate names, the emulator's first."""
        asked = self._experiment.offsite
        assert asked is not None
        small, full = [parts] * ("emu" in asked.evaluate), [self.judging(parts)] * ("full" in asked.evaluate)
        return [*small, *full]

    def free(self) -> None:
        """Give up the full model's memory, where it was loaded."""
        if "engine" in vars(self):
            self.engine.close()
        if "base" in vars(self):
            self.base.model.to("meta")


class Judge:
    """An engine to evaluate with: adapters of the emulator come in, and are judged on the full model."""

    bare = None
    """A fresh adapter changes nothing."""

    def __init__(self, closed: Closed, engine: "AnyEngine") -> None:
        self._closed = closed
        self.plan, self.store, self.private = engine.plan, engine.store, engine.private
        self.engine = closed.engine
        self.engine.halvings = engine.halvings

    def scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """See LocalEngine.scores."""
        return self.engine.scores(self._plugged(adapters), work, rows)

    def generate(
        self, adapters: Sequence[Adapter], work: Work, settings: GenerationSettings, pad_id: int, eos: Sequence[int]
    ) -> list[list[list[int]]]:
        """See the engines' generate."""
        return self.engine.generate(self._plugged(adapters), work, settings, pad_id, eos)

    def _plugged(self, adapters: Iterable[Adapter]) -> list[Adapter]:
        return [self._closed.plug(adapter) for adapter in adapters]


def settings_of(made: Emulator, model: ModelSettings) -> ModelSettings:
    """Return the settings that load the emulator as the full model's would have loaded that."""
    return model.model_copy(update={"base": str(made.folder), "revision": None, "tokenizer": None})
