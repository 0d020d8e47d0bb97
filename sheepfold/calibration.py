"""How long a run would take on this machine: a few real steps of its own engine, and its tokens at their rate.

The base is loaded and the first cohort begins its first round, one pass of it and as many steps as a few seconds hold.
What that taught is thrown away.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sheepfold import memory
from sheepfold.assembly import Parts, assemble
from sheepfold.config import Experiment
from sheepfold.engines import spreading
from sheepfold.errors import ConfigError, TrainingError
from sheepfold.forecast import Forecast
from sheepfold.marks import evaluation_rows
from sheepfold.messages import Assignment, Update

ROWS = 64
"""Held-out rows that an evaluation is timed on, at most"""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a few steps took, and what the run would take at that rate; baselines, metrics and server are not in it."""

    tokens_a_second: float
    """Trained tokens, without padding"""
    steps: int
    """Client steps that were timed"""
    round_s: float
    evaluation_s: float
    evaluations: int
    """Of the whole run, the one before round 1 included"""
    run_s: float
    """Rounds and evaluations"""
    peak_bytes: int
    """What the process had in use at its peak, meanwhile"""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return asdict(self)


def check(experiment: Experiment) -> None:
    """Raise ConfigError for an experiment of which no few steps can be taken."""
    if experiment.offsite is not None:
        raise ConfigError("plan --calibrate: offsite has its emulator made by the run itself; leave --calibrate out")
    spreading.check_alone(experiment, "plan --calibrate")


def calibrate(experiment: Experiment, foreseen: Forecast, seconds: float = 5.0) -> Calibration:
    """Return what a few steps took, about `seconds` of them after one to begin with, and what a run would take.

    Raises what the run itself would raise, and TrainingError where no step could be taken.
    """
    check(experiment)
    parts = assemble(experiment)
    try:
        memory.forget_peak(parts.base.device)
        work = _first_pass(parts)
        began = time.perf_counter()
        _train(parts, work, 1)  # the first one is slower: kernels are chosen, memory is claimed
        once = time.perf_counter() - began
        most = max(1, round(foreseen.steps_a_round / foreseen.cohort))
        timed, tokens, steps = _train(parts, work, max(1, min(most, int(seconds / once))))
        judged = _judge(parts)
    finally:
        parts.engine.close()
    every, rounds = experiment.evaluation.every, foreseen.rounds
    evaluations = 1 + (rounds // every if every else 0) + bool(not every or rounds % every)
    round_s = foreseen.tokens_in_all / rounds * timed / tokens
    return Calibration(
        tokens_a_second=tokens / timed,
        steps=steps,
        round_s=round_s,
        evaluation_s=judged,
        evaluations=evaluations,
        run_s=rounds * round_s + evaluations * judged,
        peak_bytes=memory.peak(parts.base.device),
    )


def _first_pass(parts: Parts) -> list[Assignment]:
    """Return what those clients of the first cohort are handed that would share its first pass."""
    state, lr = parts.start(), parts.experiment.train.lr
    cohort = [client for client in parts.sampler.sample(0) if len(parts.data.clients[client].train)]
    return [parts.strategy.assign(state, client, lr) for client in cohort[: parts.engine.plan.clients_per_pass]]


def _train(parts: Parts, work: list[Assignment], steps: int) -> tuple[float, int, int]:
    """Return the seconds, tokens and client steps of that many steps of each client."""
    engine = parts.engine.plain(train=parts.experiment.train.model_copy(update={"steps": steps, "epochs": None}))
    engine.rule, engine.ditto = parts.engine.rule, parts.engine.ditto
    began = time.perf_counter()
    done = [answer.measurements for answer in engine.train(work) if isinstance(answer, Update)]
    took = time.perf_counter() - began
    if not (tokens := sum(m.processed_tokens for m in done)):
        raise TrainingError("plan --calibrate: no client of the first cohort took a good step; run it and see why")
    return took, tokens, sum(m.steps for m in done)


def _judge(parts: Parts) -> float:
    """Return the seconds of an evaluation, from some of its rows."""
    lengths = parts.data.tokens.lengths()
    rows = np.concatenate([*evaluation_rows(parts).values(), parts.data.holdout])
    if not len(rows):
        return 0.0
    some = rows[:: max(1, len(rows) // ROWS)]
    began = time.perf_counter()
    parts.engine.scores([parts.start().whole()], [(0, some)], parts.experiment.evaluation.batch_rows)
    return (time.perf_counter() - began) * float(lengths[rows].sum() / lengths[some].sum())
