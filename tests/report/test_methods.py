"""Classification on the page: measures round by round, the server's teacher, and methods beside each other."""

import json
import re
import shutil
from html import unescape

import pytest

from sheepfold.report import page, words
from sheepfold.report.compare import differing, grouped, metric_curve, teacher_curve
from sheepfold.report.dumbbells import dumbbells
from sheepfold.report.facts import read_run
from sheepfold.report.intervals import interval
from sheepfold.report.lines import title
from tests.report.conftest import change_lines, journal
from tests.report.test_live import append, get, served
from tests.report.test_page import section, text


@pytest.fixture
def facts(taught):
    return read_run(taught)


def drawn(html: str, name: str) -> dict[str, dict]:
    """Return a chart's traces by their names."""
    found = re.search(rf'<script type="application/json" id="figure-{name}">(.*?)</script>', html, re.DOTALL)
    assert found, name
    return {trace.get("name", ""): trace for trace in json.loads(unescape(found[1]))["data"]}


def test_the_teachers_figures_are_the_journals(taught, facts):
    lines = journal(taught)
    assert [r.teacher for r in facts.rounds] == [line["teacher"] for line in lines]
    assert teacher_curve(facts, "accuracy") == {line["round"]: line["teacher"]["accuracy"] for line in lines}
    assert facts.seconds("server") == sum(line["seconds"].get("server", 0.0) for line in lines) > 0


def test_a_label_is_one_row_so_the_page_says_nats_per_row(facts):
    made = text(page.content([facts]))
    assert "nats per row" in made
    assert "per token" not in made


def test_the_verdict_says_what_was_reached_and_what_the_teacher_reached(taught, facts):
    first, *_, last = journal(taught)
    said = " ".join(words.verdict(facts))
    went = [f"{line['held_out']['accuracy']['global']:.1%}" for line in (first, last)]
    assert f"accuracy went from {went[0]} to {went[1]}" in said
    taught_went = [f"{line['teacher']['accuracy']:.1%}" for line in (first, last)]
    assert "The server's teacher, on the global test set: held-out loss went from" in said
    assert f"accuracy went from {taught_went[0]} to {taught_went[1]}, Matthews correlation went" in said
    assert f"{words.duration(facts.seconds('server'))} of it on the server" in said


@pytest.mark.parametrize("measure", ["loss", "accuracy", "matthews"])
def test_every_measure_is_drawn_with_the_teachers_dashed(taught, facts, measure):
    names = {"loss": "loss", "accuracy": "metric-0", "matthews": "metric-1"}
    traces = drawn(page.content([facts]), names[measure])
    own = traces["held-out, global test set" if measure == "loss" else title(measure)]
    theirs = traces["the server's teacher"]
    lines = journal(taught)
    assert own["y"] == [line["held_out"][measure]["global"] for line in lines]
    assert theirs["y"] == [line["teacher"][measure] for line in lines]
    assert own["line"]["dash"] == "solid"
    assert "dash" in theirs["line"]["dash"]


def test_a_correlation_is_no_percentage(taught, facts):
    last = journal(taught)[-1]
    row = text(
        re.search(r'<div class="scroll[^>]*aria-label="Matthews.*?</table>', page.content([facts]), re.DOTALL)[0]
    )
    assert f"2 {last['held_out']['matthews']['global']:.3f} {last['teacher']['matthews']:.3f}" in row


def test_where_no_client_has_rows_of_its_own_nothing_is_drawn_client_by_client(facts):
    made = page.content([facts])
    assert "figure-joining" not in made
    shared = facts.closing.scores["accuracy"]["shared"]
    shown = section(made, "joining")
    assert "no client has its own" in shown
    assert f"base {shared['base']:.1%} federated {shared['federated']:.1%}" in shown


def test_a_correlation_below_zero_is_on_the_chart():
    scores = {"a": {"base": -0.4, "federated": 0.5}}
    low, high = dumbbells(["a"], scores, "matthews", "federated", "row").layout.xaxis.range
    assert low < -0.4
    assert high > 0.5


def test_the_seeds_of_a_method_are_one_group_and_methods_have_short_names(three):
    groups = grouped([read_run(folder) for folder in three])
    labels = ["fedavg with method full", "fedavg with method lora", "fedkd"]
    assert [(g.label, len(g.runs)) for g in groups] == [(label, 2) for label in labels]
    assert "adapter.method" in differing([g.runs[0] for g in groups])


def test_three_methods_are_drawn_together_with_intervals_and_the_teacher(three):
    runs = [read_run(folder) for folder in three]
    made = page.content(runs)
    for name, measure in (("loss", "loss"), ("metric-0", "accuracy"), ("metric-1", "matthews")):
        traces = drawn(made, name)
        assert {"fedavg with method full", "fedavg with method lora", "fedkd", "fedkd: teacher"} <= traces.keys()
        assert "fedavg with method lora: teacher" not in traces
        student, teacher = traces["fedkd"], traces["fedkd: teacher"]
        assert teacher["line"]["color"] == student["line"]["color"]
        assert teacher["marker"]["symbol"] == student["marker"]["symbol"] + "-open"
        assert teacher["y"] == list(teacher_curve(runs[-1], measure).values())
    lora = interval([metric_curve(run, "accuracy")[2] for run in runs[2:4]])
    assert drawn(made, "metric-0")["fedavg with method lora"]["y"][2] == pytest.approx(lora.mean)
    assert f"{lora.mean:.1%} ± {100 * lora.reach:.1f} points" in section(made, "curves")


def test_accuracy_and_seconds_of_every_method_stand_side_by_side(three):
    runs = [read_run(folder) for folder in three]
    shown = section(page.content(runs), "closing")
    kd = metric_curve(runs[-1], "accuracy")[2]
    assert re.search(rf"accuracy at the end [\d.]+% ± [\d.]+ points [\d.]+% ± [\d.]+ points {kd:.1%}", shown)
    assert re.search(r"seconds of training [\d.]+ s [\d.]+ s [\d.]+ s", shown)
    assert re.search(r"seconds of these on the server – – [\d.]+ s", shown)
    assert re.search(r"the teacher's accuracy at the end – – [\d.]+%", shown)
    verdict = text(re.search(r'<div class="verdict">.*?</div>', page.content(runs), re.DOTALL)[0])
    assert "Accuracy at the end: fedavg with method full" in verdict
    assert "teacher" not in verdict


def test_a_teacher_judged_on_other_rows_than_the_clients_is_said_to_be(three):
    """With rows held out by clients as well as a test set, the curves are not of the same rows."""

    def both(line):
        line["held_out"]["loss"]["weighted"] = 0.7
        return line

    said = {}
    for change in (None, both):
        for folder in three:
            change_lines(folder, change)
            (folder / "closing.json").touch()
        said[change] = section(page.content([read_run(folder) for folder in three]), "curves")
    assert "by round, on the global test set; with open marks, the teacher that the server trains; " in said[None]
    apart = "over all clients' rows; with open marks, the teacher that the server trains on the global test set"
    assert apart in said[both]


def test_a_served_page_takes_over_the_teachers_new_figures(taught, tmp_path):
    folder, lines = tmp_path / "live", journal(taught)
    shutil.copytree(taught, folder)
    change_lines(folder, keep=2)
    with served(folder) as address:
        assert drawn(get(address + "content"), "metric-0")["the server's teacher"]["x"] == [0, 1]
        append(folder, lines[2])
        after = drawn(get(address + "content"), "metric-0")["the server's teacher"]
        assert after["y"] == [line["teacher"]["accuracy"] for line in lines]
