"""Early stop on one named figure of the held-out report, as pure functions of the state."""

import math
from collections.abc import Mapping
from dataclasses import replace

from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.evaluation.held_out import HeldOut
from sheepfold.state import Best, ServerState


def check_key(experiment: Experiment, scores: HeldOut) -> None:
    """Raise ConfigError where early stopping would wait for a figure that this data never gives."""
    name = (experiment.stop.key or "loss.sampled").removeprefix("loss.")
    if name not in (*scores.summary(), "sampled", "never_sampled"):
        raise ConfigError(
            f"stop.key loss.{name}: this data has no rows for it; set data.eval_share (own rows) or "
            "data.partition.holdout_per_category (loss.global), or another key"
        )


def watched(experiment: Experiment, state: ServerState, scores: HeldOut) -> ServerState:
    """Return the state with its best evaluation brought up to date."""
    key = experiment.stop.key
    if key is None:
        return state
    summary = scores.summary()
    name = key.removeprefix("loss.")
    if name not in summary:
        return state  # such as never_sampled, once everybody took part: no evaluation, no patience used
    best = state.best
    improved = best is None or math.isnan(best.value) or summary[name] < best.value - experiment.stop.delta
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
