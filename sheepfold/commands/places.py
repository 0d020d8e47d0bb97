"""`sheepfold run --on ...`: where an experiment's clients are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sheepfold.config import Experiment
from sheepfold.devices import group
from sheepfold.errors import ConfigError, require, suggest

PLACES = ("here", "flower")
DEFAULT = Path("fold")

Listener = Callable[[str, Mapping[str, Any]], None]


def runner(
    experiment: Experiment, on: str, fold: Path | None, resume: bool, resume_from: int | None
) -> Callable[[Listener], object]:
    """Return what runs an experiment and tells a listener. Raises ConfigError for options that do not go together."""
    if on not in PLACES:
        raise ConfigError(f"--on {on}: unknown; {suggest(on, PLACES)}")
    if group.several() and on != "here":
        raise ConfigError(f"--on {on}: clients train on machines of their own; start this without torchrun")
    if on == "here":
        if fold is not None:
            raise ConfigError(f"--fold {fold} has no effect without --on flower; add that, or remove it")
        if group.several():
            from sheepfold.devices.place import run
        else:
            from sheepfold.simulation import run  # torch and transformers come with it

        return lambda listener: run(experiment, resume=resume, resume_from=resume_from, listener=listener)
    if resume_from is not None:
        raise ConfigError("--resume-from: a run on flower goes on from its newest round; use --resume")
    require("--on flower", "flower", "flwr")
    from sheepfold.flower import submit
    from sheepfold.flower.fold import Fold

    place = Fold((fold or DEFAULT).resolve())
    return lambda listener: submit.run(experiment, place, resume=resume, listener=listener)
