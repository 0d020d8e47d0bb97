"""Which rows a client's steps see, and at which rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.config import TrainSettings
from sheepfold.local.steps import lr_factor, round_lr, step_rows, steps_in_round, steps_per_epoch, tokens_in_round

sizes = st.integers(1, 60)


@given(sizes, st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_sees_every_row_once(rows, batch_rows, epoch):
    numbers = np.arange(100, 100 + rows)
    per_epoch = steps_per_epoch(rows, batch_rows)
    seen = [step_rows(0, "ann", numbers, batch_rows, epoch * per_epoch + i) for i in range(per_epoch)]
    assert sorted(np.concatenate(seen)) == list(numbers)
    assert all(len(s) == batch_rows for s in seen[:-1])


def test_a_clients_order_depends_on_seed_client_and_epoch_and_on_nothing_else():
    numbers = np.arange(40)
    order = lambda seed, client, step: step_rows(seed, client, numbers, 40, step).tolist()  # noqa: E731
    assert order(0, "ann", 0) == order(0, "ann", 0)
    others = [order(1, "ann", 0), order(0, "bob", 0), order(0, "ann", 1)]
    assert order(0, "ann", 0) not in others


def test_a_steps_rows_are_the_same_whenever_they_are_asked_for_and_cannot_be_written_over():
    rows = np.arange(100, 123)
    forth = [step_rows(4, "ann", rows, 4, n) for n in range(12)]
    back = [step_rows(4, "ann", rows, 4, n) for n in reversed(range(12))]
    assert all((one == other).all() for one, other in zip(forth, reversed(back), strict=True))
    forth[0][:] = 0  # a caller's own
    assert (step_rows(4, "ann", rows, 4, 0) == back[-1]).all()
    assert (step_rows(4, "ann", np.arange(40), 4, 0) != back[-1]).any()


@given(sizes, st.integers(1, 20), st.integers(1, 5))
def test_epochs_and_steps_count_alike(rows, batch_rows, epochs):
    by_epochs = TrainSettings(epochs=epochs, batch_rows=batch_rows)
    steps = steps_in_round(by_epochs, rows)
    assert steps == epochs * -(-rows // batch_rows)
    assert steps_in_round(TrainSettings(steps=steps, batch_rows=batch_rows), rows) == steps


def test_clients_with_longer_rows_and_more_steps_go_through_more_tokens():
    lengths = np.array([10, 20, 300])
    train = TrainSettings(epochs=2, batch_rows=2)
    assert tokens_in_round(train, np.array([0, 1]), lengths) == 2 * 2 * 15
    assert tokens_in_round(train, np.array([2]), lengths) == 2 * 300, "one row is no full step"
    assert tokens_in_round(TrainSettings(steps=5, batch_rows=2), np.array([0, 1]), lengths) == 5 * 2 * 15
    assert tokens_in_round(train, np.array([], dtype=int), lengths) == 0


def test_one_epoch_is_what_happens_where_neither_is_set():
    assert steps_in_round(TrainSettings(batch_rows=4), 10) == 3


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 50), st.integers(0, 60))
def test_no_step_has_a_rate_of_zero_or_above_the_peak(schedule, steps, warmup):
    train = TrainSettings(schedule=schedule).model_copy(update={"warmup_steps": warmup})
    factors = [lr_factor(train, step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    assert steps == 1 or warmup >= steps - 1 or max(factors) == 1


def test_schedules_fall_as_transformers_do():
    import torch
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, theirs in (("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = theirs(optimizer, num_warmup_steps=0, num_training_steps=12)
        for step in range(12):
            assert lr_factor(TrainSettings(schedule=name), step, 12) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()


def test_flexloras_halving_starts_after_fifteen_full_rounds():
    train = TrainSettings(lr=0.1, round_schedule="halve")
    assert [round_lr(train, r, 50) for r in (0, 14, 15, 49)] == [0.1, 0.1, 0.05, 0.05]


def test_linear_and_cosine_fall_over_rounds():
    for schedule in ("linear", "cosine"):
        train = TrainSettings(lr=1.0, round_schedule=schedule)
        rates = [round_lr(train, r, 5) for r in range(5)]
        assert rates[0] == 1.0
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] > 0
