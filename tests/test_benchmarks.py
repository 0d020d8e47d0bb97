"""The study of methods, on the built-in base in seconds: pieces, going on, and the table."""

from benchmarks import methods
from benchmarks.method_list import METHODS, Size, in_words
from benchmarks.method_table import difference, table

SMALL = Size(rounds=2, clients=3, steps=1, max_tokens=64, judged=2, answers=1, new_tokens=4)
TINY = {
    "model.base": "builtin:tiny",
    "data.source": "corpus",
    "data.rows": 96,
    "data.split": "train",
    "data.partition": {"by": "iid", "clients": 8},
    "data.test_share": 0.2,
}
STUDIED = ("base", "fedit", "fedsa")


def test_a_study_that_was_killed_goes_on_where_it_was(tmp_path):
    file, where = tmp_path / "pieces.jsonl", TINY | {"cache": str(tmp_path / "cache")}
    with methods.data_read_once():
        assert methods.study(STUDIED[:2], 2, SMALL, where, file) == []
        done = file.read_text()
        file.write_text(done + done[:50])  # killed within a line
        methods.study(STUDIED, 2, SMALL, where, file)
    pieces = methods.finished(file, SMALL)
    assert {name: sorted(own) for name, own in pieces.items()} == {name: [0, 1] for name in STUDIED}
    assert file.read_text().startswith(done)
    assert len(file.read_text().splitlines()) == 7
    assert not methods.finished(file, Size())  # other settings, other pieces

    for name in STUDIED:
        assert f"| {name} | {in_words(name)} | 2 |" in table(pieces, SMALL)
    same, reach = difference(pieces, "fedsa", "base", "loss never")
    assert abs(same) < 1e-6 > reach  # fedsa's global adapter is the base
    assert pieces["fedsa"][0]["rounds"][0]["up"] < pieces["fedit"][0]["rounds"][0]["up"]


def test_every_method_of_the_study_is_an_experiment_that_passes_its_checks():
    for name in METHODS:
        made = methods.experiment(methods.settings(name, 0, Size()) | {"model.base": "builtin:tiny"})
        methods.assembly.check(made)
