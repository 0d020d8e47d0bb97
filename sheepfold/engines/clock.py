"""Where the seconds of a pass go."""

import itertools
import time
from typing import Any

import torch


class Clock:
    """Seconds by stage. On a GPU by events in its stream, read at the end: asking for the time must not hold it up."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as this stage's."""
        self.laps.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the sum of each stage."""
        total = dict.fromkeys(("data", "forward", "backward", "step"), 0.0)
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (stage, now) in itertools.pairwise(self.laps):
            total[stage] += before.elapsed_time(now) / 1000 if self.cuda else now - before
        return total

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
