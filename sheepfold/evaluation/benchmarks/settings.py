"""What an evaluation is asked to do, whichever way it was asked: the command line or the experiment file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sheepfold.errors import ConfigError

HARNESS_SEED = 1234
"""The harness's own default, so that its examples are drawn as in published figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which tasks, on which rows, asked how."""

    tasks: tuple[str, ...]
    """Names, or name:file for tasks over one's own rows."""
    data: str | None = None
    """Folder of benchmark data, or the file of one's own rows; None: the hub."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Own rows: field -> column (see data.fields), and choices."""
    shots: int | None = None
    """Examples before a question; None: as many as the benchmark has."""
    limit: int | None = None
    """Rows of each task; None: all."""
    new_tokens: int | None = None
    """Longest answer; None: as the benchmark says, at most half the model's positions."""
    samples: int = 1
    """Programs for each problem of HumanEval."""
    temperature: float = 0.0
    """At which they are drawn."""
    batch_rows: int = 16
    seed: int = HARNESS_SEED
    template: bool = False
    """Whether benchmarks' prompts are wrapped in the run's template; own tasks' always are."""
    allow_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("no tasks; name some with --tasks, such as gsm8k,mmlu (--tasks list shows all)")
        for name, least in (("limit", 1), ("shots", 0), ("batch_rows", 1), ("new_tokens", 1), ("samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature {self.temperature}: expected 0 (greedy) or more")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"--samples {self.samples}: greedy answers are all the same; add --temperature, such as 0.2"
            )

    def check_positions(self, positions: int | None) -> None:
        """Raise ConfigError where answers may be so long that no prompt fits the model; positions None: no end."""
        if self.new_tokens is not None and positions is not None and self.new_tokens >= positions:
            raise ConfigError(
                f"--new-tokens {self.new_tokens}: the model has {positions} positions, and a prompt needs some too"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return asdict(self) | {"tasks": list(self.tasks), "fields": dict(self.fields)}
