"""TensorBoard: event files, through torch's own writer (no TensorFlow)."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold.tracking.base import Start
from sheepfold.tracking.running import Status


class TensorBoard:
    """One folder of event files; `id` is that folder."""

    last = None

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = Path(start.arguments["dir"]).resolve() / start.name if "dir" in start.arguments else None
        self.id = start.id or str(place or start.folder.resolve() / "tensorboard")
        # Readers drop events of these rounds that a process left behind when it died before it could remember them.
        purge = start.first if start.id else None
        _wait_for_a_new_second(Path(self.id))
        self._writer: Any = SummaryWriter(self.id, purge_step=purge)
        if start.id is None:
            rows = "\n".join(f"| {key} | {value} |" for key, value in {**start.config, **start.facts}.items())
            self._writer.add_text("experiment", f"| option | value |\n|---|---|\n{rows}", 0)

    def round(
        self, round: int, scalars: Mapping[str, float], spreads: Mapping[str, Sequence[float]], adapter: str
    ) -> None:
        """Log scalars, histograms over clients, and the adapter's hash as text."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, round, new_style=False)
        for name, values in spreads.items():
            self._writer.add_histogram(name, np.asarray(values), round)
        self._writer.add_text("adapter", adapter, round)
        self._writer.flush()

    def figures(self, round: int, scalars: Mapping[str, float]) -> None:
        """Log single figures as scalars."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, status: Status) -> None:
        """Close the event file; it has no word for a run's end."""
        self._writer.close()


def _wait_for_a_new_second(folder: Path) -> None:
    """Wait where another event file was begun in this second: readers order files by the second in their names."""
    while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)


begin = TensorBoard
