"""One line of a run's journal as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Round:
    """One line of the journal; round 0 is the evaluated start."""

    round: int
    clients: int
    """Clients whose updates arrived."""
    absent: Mapping[str, str]
    """Sampled clients without an update, and why."""
    skipped: Mapping[str, tuple[int, str]]
    """client -> (steps not taken, why)"""
    steps: int
    """Optimizer steps of the clients that answered, in sum."""
    train_loss: float | None
    loss: Mapping[str, float]
    """Held-out loss by key, nats per target token; empty where the round was not evaluated."""
    metrics: Mapping[str, float]
    """Further measures of the round, where the journal has some."""
    rose: bool
    uplink_bytes: int
    downlink_bytes: int
    seconds: Mapping[str, float]
    """round, server, data, forward, backward, step, evaluation; of these data to step are sums over clients' shares of
    their passes."""
    teacher: Mapping[str, float] = field(default_factory=dict)
    """Loss and measures of the teacher that the server trains, on everybody's rows; empty where there is none."""


NAMES = {"loss": "held-out loss", "matthews": "Matthews correlation", "f1": "F1"}


def title(measure: str) -> str:
    """Return a measure's name for people."""
    return NAMES.get(measure, measure.replace("_", " "))


def is_share(measure: str) -> bool:
    """Return whether a measure lies between 0 and 1, and is shown as a percentage."""
    return not any(word in measure for word in ("loss", "matthews", "number"))


def read_round(line: Mapping[str, Any]) -> Round:
    """Return a line of the journal as a value; raises KeyError and the like for what is no such line."""
    held, clients = line.get("held_out", {}), line.get("clients", {})
    skipped = {c: (m["skipped_steps"], m.get("why_skipped", "")) for c, m in clients.items() if m.get("skipped_steps")}
    return Round(
        round=int(line["round"]),
        clients=len(clients),
        absent=line.get("absent", {}),
        skipped=skipped,
        steps=sum(m.get("steps", 0) for m in clients.values()),
        train_loss=line.get("train_loss"),
        loss=numbers(held.get("loss", {})),
        metrics=_measures(held) | _of_full(line.get("held_out_full", {})),
        rose=bool(line.get("rose")),
        uplink_bytes=line.get("uplink_bytes", 0),
        downlink_bytes=line.get("downlink_bytes", 0),
        seconds=numbers(line.get("seconds", {})),
        teacher=numbers(line.get("teacher", {})),
    )


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what is a number: the journal has null where a figure was not finite."""
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float)}


def _measures(held: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures beside the loss: a number, or a mapping with `weighted` or `global` as the loss has it."""
    found = {}
    for name, value in held.items():
        if name != "loss" and not name.startswith("clients"):
            of = value if not isinstance(value, Mapping) else value.get("weighted", value.get("global"))
            if isinstance(of, int | float):
                found[name] = float(of)
    return found


def _of_full(held: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out loss of a closed model, where it was judged beside its emulator."""
    loss = numbers(held.get("loss", {}))
    found = loss.get("weighted", loss.get("global"))
    return {} if found is None else {"full model's held-out loss": found}
