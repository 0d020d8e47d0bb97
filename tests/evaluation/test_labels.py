"""Accuracy, Matthews correlation and F1 from counts: the same however rows are split over clients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from sheepfold.errors import ConfigError
from sheepfold.evaluation import labels
from sheepfold.evaluation.held_out import held_out
from sheepfold.metrics import Mean, Score

pairs = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


def counted(rows, classes=2):
    table = np.zeros((classes, classes), dtype=np.int64)
    for true, given_ in rows:
        table[true, given_] += 1
    return table


@pytest.mark.filterwarnings("ignore:A single label was found")  # by the oracle
@given(pairs)
def test_counts_give_what_scikit_learn_gives_row_by_row(rows):
    true, predicted = zip(*rows, strict=True)
    assert labels.accuracy(counted(rows)) == pytest.approx(metrics.accuracy_score(true, predicted))
    assert labels.matthews(counted(rows)) == pytest.approx(metrics.matthews_corrcoef(true, predicted))
    assert labels.f1(counted(rows)) == pytest.approx(metrics.f1_score(true, predicted, zero_division=0.0))


def test_three_labels_give_the_mean_f1_and_the_general_matthews():
    rows = [(0, 0), (0, 1), (1, 1), (2, 2), (2, 0), (2, 2)]
    true, predicted = zip(*rows, strict=True)
    assert labels.f1(counted(rows, 3)) == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert labels.matthews(counted(rows, 3)) == pytest.approx(metrics.matthews_corrcoef(true, predicted))


@given(pairs, st.integers(1, 5))
def test_everybodys_figures_do_not_depend_on_who_holds_which_row(rows, clients):
    scores = [Score(Mean(1.0, len(rows[k::clients])), counted(rows[k::clients])) for k in range(clients)]
    names = [f"c{k}" for k in range(clients)]
    found = held_out(names, scores, frozenset(), has_global=False, measures=("accuracy", "matthews"))
    assert found.summary("accuracy")["weighted"] == pytest.approx(labels.accuracy(counted(rows)))
    assert found.summary("matthews")["weighted"] == pytest.approx(labels.matthews(counted(rows)))


def test_the_worst_tenth_has_the_lowest_accuracy_and_the_global_set_is_apart():
    good, poor, test = counted([(0, 0), (1, 1)]), counted([(0, 1), (1, 1), (1, 0), (0, 1)]), counted([(1, 1)])
    scores = [Score(Mean(1.0, 2.0), good), Score(Mean(4.0, 4.0), poor), Score(), Score(Mean(0.1, 1.0), test)]
    found = held_out(["a", "b", "none"], scores, frozenset({"b"}), has_global=True, measures=("accuracy",))
    summary = found.summary("accuracy")
    assert (summary["best_decile"], summary["worst_decile"], summary["plain"]) == (1.0, 0.25, 0.625)
    assert (summary["weighted"], summary["global"]) == (0.5, 1.0)
    assert (summary["sampled"], summary["never_sampled"]) == (1.0, 0.25)
    assert found.as_dict()["clients_accuracy"] == {"a": 1.0, "b": 0.25}
    assert found.as_dict()["loss"]["global"] == 0.1


def test_an_unknown_measure_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"no 'mathews' with task classification; did you mean 'matthews'"):
        labels.check(["accuracy", "mathews"])
