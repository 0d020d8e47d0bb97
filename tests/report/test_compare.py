"""Several runs on one page."""

import re

import pytest

from sheepfold.errors import ConfigError
from sheepfold.report import page
from sheepfold.report.compare import differing, grouped, loss_curve
from sheepfold.report.facts import read_run
from sheepfold.report.intervals import interval
from tests.report.test_page import section, text


def shifted(by):
    def change(line):
        line["held_out"]["loss"]["weighted"] += by * line["round"]
        line["held_out"]["accuracy"] = 0.1 * line["round"] - by
        return line

    return change


@pytest.fixture
def runs(copied):
    """Two methods, three seeds each; the second loses 0.3 a round, a little differently under each seed."""
    made = [copied(f"a{s}", shifted(0.01 * s), seed=s) for s in range(3)]
    made += [
        copied(f"b{s}", shifted(0.3 + 0.02 * s), seed=s, federation__strategy="fedavg", adapter__ranks=None)
        for s in range(3)
    ]
    return [read_run(folder) for folder in made]


def test_runs_that_differ_only_in_their_seed_are_one_group(runs):
    groups = grouped(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("flexlora", 3), ("fedavg", 3)]
    assert differing([g.runs[0] for g in groups]) == ["adapter.ranks", "federation.strategy"]


def test_a_group_has_the_mean_and_interval_of_its_runs(runs):
    group = grouped(runs)[0]
    ends = [loss_curve(run)[2] for run in group.runs]
    assert group.curve(loss_curve)[2] == interval(ends)
    assert f"{interval(ends).mean:.3f} ± {interval(ends).reach:.3f}" in text(page.content(runs))


def test_a_difference_that_stands_out_is_called_one(runs):
    made = page.content(runs)
    said = text(re.search(r'<div class="verdict">.*?</div>', made, re.DOTALL)[0])
    assert "6 runs of 2 experiments" in said
    assert "fedavg is worse than flexlora, by 0.620 ± 0.050" in said  # differences 0.60, 0.62, 0.64
    assert "+0.620 ± 0.050 (differs)" in section(made, "closing")
    assert "federation.strategy flexlora fedavg" in section(made, "settings")
    assert "seed 0, 1, 2 0, 1, 2" in section(made, "settings")


def test_every_methods_loss_and_accuracy_are_drawn_together(runs):
    shown = section(page.content(runs), "curves")
    assert "Held-out loss" in shown
    assert "Accuracy by round" in shown


def test_one_run_of_each_says_that_chance_is_not_known(runs):
    said = text(page.content([runs[0], runs[3]]))
    assert "whether fedavg differs from flexlora beyond chance is not known" in said


def test_runs_on_other_data_say_so(runs, copied):
    other = copied("c0", federation__strategy="fedex")
    facts = read_run(other)
    facts.data["fingerprint"] = "another"
    assert "Their data, partitions or tokens differ" in text(page.content([runs[0], facts]))
    assert "Their data" not in text(page.content(runs))


def test_one_run_named_twice_is_refused(copied):
    with pytest.raises(ConfigError, match="the same experiment with the same seed"):
        grouped([read_run(copied("a")), read_run(copied("b"))])


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, copied, tmp_path):
    again = []
    for seed, place in enumerate("xy"):
        (tmp_path / place).mkdir()
        folder = copied("twin", seed=seed, federation__strategy="fedex").rename(tmp_path / place / "twin")
        again.append(read_run(folder))
    made = page.content([runs[0], *again])
    for name in ("faults", "experiments"):
        shown = section(made, name)
        assert "x/twin" in shown
        assert "y/twin" in shown
        assert f"{tmp_path.name}/a0" in shown
    assert page.whole("t", made).count("ritten by sheepfold") == 1


def test_three_methods_are_three_curves(runs, copied):
    third = read_run(copied("c", shifted(0.1), federation__strategy="fedsa"))
    assert [g.label for g in grouped([runs[0], runs[3], third])] == ["flexlora", "fedavg", "fedsa"]
