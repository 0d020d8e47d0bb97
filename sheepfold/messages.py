"""What goes out to a client and what comes back, as values; wire/packing.py makes bytes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sheepfold.adapter import Adapter, LoraPair, kind, nbytes
from sheepfold.metrics import Mean
from sheepfold.wire.dtypes import Format


@dataclass(frozen=True, slots=True)
class Wire:
    """How numbers travel."""

    up: Format = "fp32"
    down: Format = "fp32"


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
    side: Adapter = field(default_factory=Adapter)
    """What the base has changed by since the run began: frozen pairs, the same for everybody."""
    frozen: frozenset[str] = frozenset()
    """Kinds of tensors that nobody sends back, such as {"A"} (see adapter.kind): they do not train this round, or how
    they moved follows from what is sent beside."""
    known: frozenset[str] = frozenset({"positions"})
    """Kinds of tensors, or flat names, that a client makes from the seed or the base, so that nobody sends them."""
    wire: Wire = Wire()
    last: int = 0
    """Rounds completed after this client's last update that counted; 0: none did. It goes on from what it kept then."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers that travel downwards, as they are; `packing.sent_bytes` counts the whole message."""
        side = sum(min(nbytes({"A": p.A, "B": p.B}), _dense_bytes(p)) for p in self.side.pairs.values())
        return nbytes(self.sent()) + side + nbytes(self.memory)

    def sent(self) -> dict[str, Tensor]:
        """Return those of the adapter's tensors that travel, by flat name."""
        return {n: t for n, t in self.adapter.tensors().items() if not {n, kind(n)} & self.known}

    def trained(self, private: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return those of the adapter's tensors that a client sends back, by flat name, as they were handed out."""
        tensors = self.adapter.tensors().items()
        return {n: t for n, t in tensors if not (kind(n) in self.frozen or kind(n) == "positions" or private(n))}


def _dense_bytes(pair: LoraPair) -> int:
    """Return the bytes of a pair's product: a side whose factors are larger travels so."""
    return pair.B.shape[0] * pair.A.shape[1] * pair.A.element_size()


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
    """Whole: what did not travel is as it was handed out."""
    measurements: Measurements
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the strategy wants to hear beside the adapter."""
    unsent: frozenset[str] = frozenset()
    """Flat names of the adapter's tensors that stayed with the client, or did not train."""
    sent_bytes: int | None = None
    """Bytes that arrived; None: it did not travel."""
    late: int | None = None
    """Rounds completed before the round that it answers, where that one has closed without it; else None."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers that travel upwards, as they are; `packing.sent_bytes` counts the whole message."""
        return nbytes(self.sent()) + nbytes(self.memory)

    def sent(self) -> dict[str, Tensor]:
        """Return those of the adapter's tensors that travel, by flat name."""
        return {name: t for name, t in self.adapter.tensors().items() if name not in self.unsent}


@dataclass(frozen=True, slots=True)
class Absence:
    """A client that returns nothing, and why; it takes no part in the fold."""

    client: str
    reason: str
    steps: int = 0
    """Steps it drew rows for all the same."""
    sent_bytes: int = 0
    """Bytes that arrived all the same."""
    late: int | None = None
    """Rounds completed before the round that it answers, where that one has closed without it; else None."""
