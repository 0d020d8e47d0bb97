"""Weights & Biases: online with a key, or offline into a folder that `wandb sync` sends later."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError
from sheepfold.tracking.base import Start
from sheepfold.tracking.running import Status


class WandB:
    """One run of Weights & Biases; `id` is that run's."""

    last = None

    def __init__(self, start: Start) -> None:
        import wandb

        mode: Any = start.arguments.get("mode") or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not wandb.login(prompt=False):  # else wandb would ask for one, in the middle of a run
            raise ConfigError("no key for Weights & Biases; `wandb login`, or set its mode to offline")
        self._wandb: Any = wandb
        self.id = start.id or uuid.uuid4().hex[:8]
        place = Path(start.arguments.get("dir") or start.folder)
        place.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=start.arguments.get("project", "sheepfold"),
            entity=start.arguments.get("entity"),
            dir=str(place),
            id=self.id,
            name=start.name,
            resume="allow",
            mode=mode,
            config={**start.config, **{f"run.{key}": value for key, value in start.facts.items()}},
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def round(
        self, round: int, scalars: Mapping[str, float], spreads: Mapping[str, Sequence[float]], adapter: str
    ) -> None:
        """Log scalars and histograms over clients at the round's step; the adapter's hash goes beside them."""
        histograms = {name: self._wandb.Histogram(list(values)) for name, values in spreads.items()}
        self._run.log({**scalars, **histograms, "adapter": adapter, "round": round}, step=round, commit=True)

    def figures(self, round: int, scalars: Mapping[str, float]) -> None:
        """Write single figures into the run's summary."""
        self._run.summary.update(dict(scalars))

    def close(self, status: Status) -> None:
        """Finish the run, which takes no word for one that goes on; what is offline stays in its folder."""
        self._run.finish(exit_code=1 if status == "failed" else 0)


begin = WandB
