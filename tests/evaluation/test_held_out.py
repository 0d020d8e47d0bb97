"""Held-out loss: weights, deciles, and who was never sampled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.evaluation.held_out import HeldOut, held_out
from sheepfold.metrics import Mean, Score

means = st.builds(Mean, st.floats(0.1, 500), st.integers(1, 90).map(float))
clients = st.dictionaries(st.sampled_from([f"c{i}" for i in range(30)]), means, min_size=1)


@given(clients)
def test_weighted_counts_tokens_and_plain_counts_clients(measured):
    summary = HeldOut(measured).summary()
    total, count = sum(m.total for m in measured.values()), sum(m.count for m in measured.values())
    assert summary["weighted"] == pytest.approx(total / count)
    assert summary["plain"] == pytest.approx(sum(m.value for m in measured.values()) / len(measured))
    assert summary["best_decile"] <= summary["plain"] * (1 + 1e-12)
    assert summary["plain"] <= summary["worst_decile"] * (1 + 1e-12)


def test_a_decile_is_a_tenth_of_the_clients_and_at_least_one():
    measured = {f"c{i}": Mean(float(i), 1.0) for i in range(25)}
    summary = HeldOut(measured).summary()
    assert summary["worst_decile"] == (24 + 23) / 2
    assert summary["best_decile"] == (0 + 1) / 2
    few = HeldOut({"a": Mean(1.0, 1.0), "b": Mean(3.0, 1.0)}).summary()
    assert (few["best_decile"], few["worst_decile"]) == (1.0, 3.0)


def test_clients_never_sampled_are_reported_apart_and_the_global_set_beside():
    measured = {"a": Mean(10.0, 10.0), "b": Mean(60.0, 20.0)}
    summary = HeldOut(measured, Mean(8.0, 2.0), frozenset({"b"})).summary()
    assert (summary["sampled"], summary["never_sampled"], summary["global"]) == (1.0, 3.0, 4.0)
    everybody = HeldOut(measured).summary()
    assert "never_sampled" not in everybody
    assert "global" not in everybody


def test_a_client_without_held_out_rows_has_no_score():
    measured = [Score(Mean(2.0, 1.0)), Score(), Score(Mean(5.0, 1.0))]
    scores = held_out(["a", "b"], measured, frozenset(), has_global=True)
    assert set(scores.clients) == {"a"}
    assert scores.overall == Mean(5.0, 1.0)
    assert HeldOut({}).summary() == {}
