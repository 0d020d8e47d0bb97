"""ServerState: everything the next round depends on, as one frozen value and one file.

A state is written to a temporary file, flushed to the disk and renamed, so a process that dies at any moment leaves
either the old state or the new one. The file is safetensors with a JSON head; a hash over its tensors finds damage.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from sheepfold.adapter import Adapter, combined, from_tensors
from sheepfold.errors import CheckpointError
from sheepfold.folders import replace_file

FORMAT = 3
READ = (2, FORMAT)
"""Formats that can be read; in the second, clients went on from whatever they had kept."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a cohort is cut into passes. Floating-point sums depend on it, so it is part of the state."""

    clients_per_pass: int
    """Clients that train through the base together."""
    micro_rows: int
    """Rows of one client in a forward pass."""
    micro_tokens: int
    """Most tokens, padding included, in a forward pass over all clients."""
    judged_rows: int | None = None
    """Most rows that are evaluated at a time, where memory ran out with `evaluation.batch_rows`."""
    recompute: bool = False
    """Whether the base's blocks run again in the backward pass (gradient checkpointing)."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far of the key that early stopping watches."""

    key: str
    value: float
    round: int
    waited: int = 0
    """Evaluations since then."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all rounds of a run have in common. It follows from the experiment, so it is not saved with the state."""

    seed: int = 0
    clients: Sequence[str] = ()
    ranks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """client -> module path -> rank; clients that are not there have the global adapter's ranks"""
    widest: Mapping[str, int] = field(default_factory=dict)
    """module path -> the largest rank of any client; empty: the global adapter's"""
    alpha: float = 16.0
    """A pair of rank r is scaled by alpha / r."""
    steps: int | None = None
    """Steps of every client in a round; None where that follows from its rows"""
    weight: Callable[[str], Tensor] | None = None
    """module path -> the base's weight, (d_out, d_in), in float32"""


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything the next round depends on."""

    round: int
    """Rounds completed."""
    adapter: Adapter
    """The global adapter: what clients start from, beside `side`."""
    plan: BatchPlan
    drawn: Mapping[str, int] = field(default_factory=dict)
    """Steps that each client has drawn so far; clients never sampled are absent."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Rounds completed after each client's last update that counted; clients of which none did are absent"""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """The strategy's own: momentum, control variates."""
    best: Best | None = None
    side: Adapter = field(default_factory=Adapter)
    """What methods that change the base have changed it by; frozen in training. The base itself stays as it is."""
    setting: Setting = Setting()

    def advance(
        self, adapter: Adapter, memory: Mapping[str, Tensor] | None = None, side: Adapter | None = None
    ) -> "ServerState":
        """Return the state after one more round with this global adapter."""
        return replace(
            self,
            round=self.round + 1,
            adapter=adapter,
            memory=self.memory if memory is None else memory,
            side=self.side if side is None else side,
        )

    def hash(self) -> str:
        """Return a hash over what was learned: equal hashes mean equal bits."""
        if not self.side.pairs:
            return self.adapter.hash()
        return hashlib.sha256((self.adapter.hash() + self.side.hash()).encode()).hexdigest()

    def whole(self) -> Adapter:
        """Return all that was learned, as one adapter on the base as it was: this is evaluated and exported."""
        return combined(self.side, self.adapter)


def save(state: ServerState, path: Path) -> None:
    """Write a state so that the file is always whole. Raises CheckpointError where the disk refuses."""
    from safetensors.torch import save as serialise

    tensors = {f"{part}:{name}": t for part, held in _parts(state).items() for name, t in held.items()}
    head = {
        "format": FORMAT,
        "round": state.round,
        "scales": {name: pair.scale for name, pair in state.adapter.pairs.items()},
        "side_scales": {name: pair.scale for name, pair in state.side.pairs.items()},
        "shapes": {name: sparse.shape for name, sparse in state.adapter.sparse.items()},
        "plan": asdict(state.plan),
        "drawn": dict(state.drawn),
        "counted": dict(state.counted),
        "best": asdict(state.best) if state.best else None,
        "hash": _hash(tensors),
    }
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, serialise(contiguous, metadata={"sheepfold": json.dumps(head)}))


def _parts(state: ServerState) -> dict[str, Mapping[str, Tensor]]:
    return {"adapter": state.adapter.tensors(), "side": state.side.tensors(), "memory": state.memory}


def load(path: Path, setting: Setting = Setting()) -> ServerState:
    """Return the state of a file. Raises CheckpointError for a missing, truncated or altered one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get("sheepfold", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no iterator of its own
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such state; the run has not finished a round yet, start it anew") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another round: {_others(path)}") from None
    if not head or head.get("format") not in READ:
        raise CheckpointError(f"{path}: not a sheepfold state of format {FORMAT}; it was written by another program")
    if head["hash"] != _hash(tensors):
        raise CheckpointError(f"{path}: its numbers were altered; resume from another round: {_others(path)}")
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "side": {}, "memory": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(":")
        parts[part][rest] = tensor
    return ServerState(
        round=head["round"],
        adapter=from_tensors(parts["adapter"], head["scales"], head["shapes"]),
        plan=BatchPlan(**head["plan"]),
        drawn=head["drawn"],
        counted=head["counted"] if head["format"] == FORMAT else dict.fromkeys(head["drawn"], head["round"]),
        memory=parts["memory"],
        best=Best(**head["best"]) if head["best"] else None,
        side=from_tensors(parts["side"], head["side_scales"]),
        setting=setting,
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Write a run's file so that it is always whole; raises CheckpointError where the disk refuses."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or set another output folder, "
            "then go on with --resume"
        ) from None


def _hash(tensors: Mapping[str, Tensor]) -> str:
    return Adapter(extra=tensors).hash()


def _others(path: Path) -> str:
    kept = sorted(p.stem.removeprefix("round-") for p in path.parent.glob("round-*.safetensors") if p != path)
    return f"--resume-from {' or '.join(kept)}" if kept else "none was kept (see keep_rounds)"
