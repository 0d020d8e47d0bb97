"""What a terminal shows of a run."""

import io

import pytest
from rich.console import Console

from sheepfold.display import Terminal, closing_table
from sheepfold.joining import Closing

START = {"round": 0, "held_out": {"loss": {"global": 0.7}, "accuracy": {"global": 0.5}}, "seconds": {"evaluation": 1.0}}
ROUND = {
    "round": 1,
    "clients": {"a": {"skipped_steps": 0}, "b": {"skipped_steps": 2}},
    "train_loss": 0.6,
    "held_out": {"loss": {"global": 0.4}, "accuracy": {"global": 0.83}, "matthews": {"global": -0.25}},
    "uplink_bytes": 34_300,
    "seconds": {"round": 12.0, "server": 7.0},
}
TEACHER = {"teacher": {"loss": 0.3125, "accuracy": 0.875, "matthews": 0.5}}


def shown(*parts):
    made = Console(file=io.StringIO(), width=160)
    for part in parts:
        made.print(part)
    return made.file.getvalue()


def heard(lines, terminal=False, width=160):
    """Return a run's view, and what it printed, after these lines."""
    view = Terminal(Console(file=io.StringIO(), width=width, force_terminal=terminal))
    for line in lines:
        view("round", line)
    return view, view.console.file.getvalue()


def test_a_round_has_its_measures_and_the_teachers_loss_and_accuracy():
    _, said = heard([START | TEACHER, ROUND | TEACHER], width=300)
    assert "accuracy 83.0%, matthews -0.250, teacher 0.3125 87.5%, sent up 34.3 kB, seconds 12.0" in said
    assert "2 steps skipped" in said


@pytest.mark.parametrize("teacher", [{}, TEACHER])
def test_the_table_has_columns_for_what_was_measured_alone(teacher):
    view, _ = heard([START | teacher, ROUND | teacher])
    made = shown(view.rounds())
    for name in ("clients", "train loss", "held-out loss", "accuracy", "matthews", "sent up", "seconds"):
        assert name in made
    assert ("teacher" in made) == bool(teacher)
    for name in ("f1", "worst tenth", "never sampled"):
        assert name not in made
    spread = ROUND | {"held_out": {"loss": {"weighted": 0.4, "worst_decile": 0.9}}}
    assert "worst tenth" in shown(heard([spread])[0].rounds())


def test_the_table_of_a_distilled_classifier_fits_a_narrow_terminal():
    view, _ = heard([START | TEACHER, ROUND | TEACHER])
    made = Console(file=io.StringIO(), width=100)
    made.print(view.rounds())
    lines = made.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert any("held-out loss" in line and "seconds" in line for line in lines), "headings on one line"


def test_a_closing_table_lists_the_clients_that_have_scores():
    everybody = {"base": 0.5, "federated": 0.75}
    made = shown(closing_table(Closing({"accuracy": {"shared": everybody}}, ["a", "b"], 9), "accuracy"))
    assert "everybody" in made
    assert "75.0%" in made
    for word in ("mean of clients", "alone, on", " a ", " b "):
        assert word not in made
    own = {"shared": everybody | {"local:a": 0.25}, "a": {"base": 0.5, "local": 0.625, "federated": 0.875}}
    made = shown(closing_table(Closing({"accuracy": own}, ["a", "b"], 9), "accuracy"))
    for word in ("alone, on everybody's", "25.0%", "62.5%", "87.5%", "mean of clients"):
        assert word in made
