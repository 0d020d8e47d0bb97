"""Early stop on one named figure of the held-out report, as pure functions of the state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.evaluation.held_out import KEYS, HeldOut
from sheepfold.state import Best, ServerState


def parsed(key: str) -> tuple[str, str]:
    """Return a key's measure and figure: 'accuracy.weighted'; a figure alone is the loss's."""
    measure, _, name = key.rpartition(".")
    return measure or "loss", name


def check_name(key: str, measures: Sequence[str]) -> None:
    """Raise ConfigError for a key that no evaluation has; measures: what is measured beside the loss."""
    measure, name = parsed(key)
    if measure not in ("loss", *measures) or name not in KEYS:
        known = [f"{m}.{k}" for m in ("loss", *measures) for k in KEYS]
        raise ConfigError(f"stop.key {key!r}: known: {', '.join(known)}")


def check_key(experiment: Experiment, scores: HeldOut) -> None:
    """Raise ConfigError where early stopping would wait for a figure that this data never gives."""
    measure, name = parsed(experiment.stop.key or "loss.sampled")
    if name not in (*scores.summary(measure), "sampled", "never_sampled"):
        raise ConfigError(
            f"stop.key {measure}.{name}: this data has no rows for it; set data.eval_share (own rows) or "
            f"data.partition.holdout_per_category ({measure}.global), or another key"
        )


def watched(experiment: Experiment, state: ServerState, scores: HeldOut) -> ServerState:
    """Return the state with its best evaluation brought up to date."""
    key = experiment.stop.key
    if key is None:
        return state
    measure, name = parsed(key)
    summary = scores.summary(measure)
    if name not in summary:
        return state  # such as never_sampled, once everybody took part: no evaluation, no patience used
    best, sign = state.best, 1 if measure == "loss" else -1
    least = experiment.stop.delta
    improved = best is None or math.isnan(best.value) or sign * summary[name] < sign * best.value - least
    if best is None or improved:
        return replace(state, best=Best(key, summary[name], state.round))
    return replace(state, best=replace(best, waited=best.waited + 1))


def stopped(experiment: Experiment, state: ServerState) -> bool:
    """Return whether the run's patience is used up."""
    return state.best is not None and state.best.waited >= experiment.stop.patience


def rose(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Return whether held-out loss is no lower than at the last evaluation, nan included."""
    key = "weighted" if "weighted" in now else "global"
    was = before.get(key)  # None where the journal had to write nan as null
    return was is not None and key in now and not now[key] < was
