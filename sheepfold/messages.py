"""What goes out to a client and what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sheepfold.adapter import Adapter
from sheepfold.metrics import Mean


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a client is handed for one round."""

    client: str
    round: int
    """Rounds completed before this one."""
    adapter: Adapter
    """Where the client starts."""
    lr: float
    """Peak learning rate of this round."""
    first_step: int = 0
    """Optimizer steps this client has drawn rows for in earlier rounds; its row order goes on from there."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the strategy wants the client to have beside the adapter."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What one client's local training amounted to."""

    loss: Mean
    """Nats over target tokens, over the steps that were taken."""
    rows: int
    """Training rows the client holds."""
    target_tokens: int
    """Target tokens of those rows."""
    processed_rows: int
    """Rows that went through a step that was taken."""
    processed_tokens: int
    """Tokens of those rows, padding not counted."""
    steps: int
    """Optimizer steps drawn, good or not."""
    skipped_steps: int = 0
    """Steps not taken: their loss or gradient was not finite."""
    why_skipped: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """This client's share of its pass: data, forward, backward, step."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a client returns."""

    client: str
    adapter: Adapter
    measurements: Measurements


@dataclass(frozen=True, slots=True)
class Absence:
    """A client that returns nothing, and why; it takes no part in the fold."""

    client: str
    reason: str
    steps: int = 0
    """Steps it drew rows for all the same."""
