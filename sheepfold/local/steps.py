"""Which rows a client's steps see, and at which learning rate.

A client's row order is an endless sequence of shuffles, one per epoch, each named by (seed, client, epoch). Step n of a
client is always the same rows, whatever the round, the cohort or the process; a round goes on where the last one ended.
No step crosses an epoch's end, so the last step of an epoch may be short.
"""

import math
from functools import lru_cache

import numpy as np

from sheepfold.config import TrainSettings
from sheepfold.rng import stream


def steps_per_epoch(rows: int, batch_rows: int) -> int:
    """Return ceil(rows / batch_rows)."""
    return -(-rows // batch_rows)


def steps_in_round(train: TrainSettings, rows: int) -> int:
    """Return how many optimizer steps a client with this many rows takes in one round."""
    if train.steps is not None:
        return train.steps
    return (train.epochs or 1) * steps_per_epoch(rows, train.batch_rows)


def tokens_in_round(train: TrainSettings, rows: np.ndarray, lengths: np.ndarray) -> float:
    """Return about how many tokens a client with these rows goes through in one round; lengths: every row's tokens."""
    if not len(rows):
        return 0.0
    return steps_in_round(train, len(rows)) * min(train.batch_rows, len(rows)) * float(lengths[rows].mean())


def step_rows(seed: int, client: str, rows: np.ndarray, batch_rows: int, step: int) -> np.ndarray:
    """Return the row numbers of a client's step, counted from its first step in the run; at most (batch_rows,)."""
    epoch, part = divmod(step, steps_per_epoch(len(rows), batch_rows))
    order = _order(seed, client, epoch, len(rows))
    numbers: np.ndarray = rows[order[part * batch_rows : (part + 1) * batch_rows]]
    return numbers


@lru_cache(maxsize=512)  # the clients of some passes; drawn for every step, large clients' orders took their time
def _order(seed: int, client: str, epoch: int, rows: int) -> np.ndarray:
    """Return an epoch's shuffle, (rows,) int64: positions among the client's rows."""
    order: np.ndarray = stream(seed, "rows", client, epoch).permutation(rows)
    order.setflags(write=False)
    return order


def lr_factor(train: TrainSettings, step: int, steps: int) -> float:
    """Return the learning rate of a round's step (counted from 0) as a share of the round's peak.

    Warm-up rises to the peak in `warmup_steps` steps; linear and cosine then fall towards zero at `steps`, as
    transformers' schedules do, but no step has a rate of zero.
    """
    warmup = min(train.warmup_steps, steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _decay(train.schedule, (step - warmup) / max(1, steps - warmup))


def round_lr(train: TrainSettings, round: int, rounds: int) -> float:
    """Return the peak learning rate of a round (counted from 0) of a run of `rounds`."""
    if train.round_schedule == "halve":
        return train.lr * (0.5 if round >= train.halve_after else 1.0)
    return train.lr * _decay(train.round_schedule, round / rounds)


def _decay(schedule: str, progress: float) -> float:
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
