"""Early stop: what counts as better, how long it waits, and what nan does."""

import math

import pytest
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import build
from sheepfold.errors import ConfigError
from sheepfold.evaluation.held_out import HeldOut
from sheepfold.metrics import Mean
from sheepfold.state import BatchPlan, ServerState
from sheepfold.stopping import check_key, rose, stopped, watched


def after(losses: list[float], patience: int = 2, delta: float = 0.0, key: str | None = "loss.weighted") -> ServerState:
    experiment = build({"stop": {"key": key, "patience": patience, "delta": delta}})
    state = ServerState(0, Adapter(extra={"w": torch.zeros(1)}), BatchPlan(1, 1, 1))
    for round, loss in enumerate(losses):
        state = ServerState(round, state.adapter, state.plan, best=state.best)
        state = watched(experiment, state, HeldOut({"a": Mean(loss, 1.0)}))
        if stopped(experiment, state):
            return state
    return state


def test_it_stops_after_patience_evaluations_without_improvement_and_keeps_the_best_round():
    state = after([3.0, 2.0, 2.5, 2.4, 1.0])
    assert (state.round, state.best.round, state.best.value, state.best.waited) == (3, 1, 2.0, 2)


def test_an_improvement_within_delta_is_none():
    assert after([3.0, 2.95, 2.9], delta=0.2).best.round == 0
    assert after([3.0, 2.95, 2.7], delta=0.2).best.round == 2


def test_equal_is_no_improvement():
    assert after([3.0, 3.0, 3.0]).best.waited == 2


def test_nan_is_never_better_and_never_the_last_word():
    assert after([3.0, math.nan, 2.0]).best.round == 2
    assert after([math.nan, 3.0]).best.value == 3.0


def test_without_a_key_nothing_is_watched():
    assert after([3.0, 4.0, 5.0], key=None).best is None


def test_a_key_that_this_data_never_gives_is_refused():
    scores = HeldOut({"a": Mean(1.0, 1.0)})
    check_key(build({"stop": {"key": "loss.never_sampled"}}), scores)
    with pytest.raises(ConfigError, match="holdout_per_category"):
        check_key(build({"stop": {"key": "loss.global"}}), scores)


def test_a_loss_that_is_no_lower_rose():
    assert rose({"weighted": 1.0}, {"weighted": 1.0})
    assert rose({"weighted": 1.0}, {"weighted": math.nan})
    assert not rose({"weighted": 1.0}, {"weighted": 0.9})
    assert not rose({"weighted": None}, {"weighted": 0.9})
    assert rose({"global": 1.0}, {"global": 2.0})
