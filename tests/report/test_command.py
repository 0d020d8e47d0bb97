"""The command: a file where it is asked for, and one clear line where it cannot be."""

import sys

import pytest
from transformers import GPT2Config

from sheepfold import cli


@pytest.fixture
def report(monkeypatch, capsys):
    def go(*words):
        monkeypatch.setattr(sys, "argv", ["sheepfold", "report", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        return end.value.code or 0, told.out.strip(), told.err.strip()

    return go


def test_a_runs_report_is_written_beside_it_or_where_asked(report, copied, tmp_path):
    folder = copied()
    assert report(folder) == (0, str(folder / "report.html"), "")
    assert (folder / "report.html").read_text(encoding="utf-8").count("<h1") == 1
    assert report(folder, "--out", tmp_path / "other.html")[1] == str(tmp_path / "other.html")
    assert report(folder / "adapter", "--base", "builtin:tiny", "--out", tmp_path / "adapter.html")[0] == 0
    assert "base, as it was named here" in (tmp_path / "adapter.html").read_text(encoding="utf-8")


def test_several_runs_are_one_file_beside_them(report, copied, tmp_path):
    first, second = copied("a"), copied("b", seed=5)
    assert report(first, second)[1] == str(tmp_path / "report.html")
    assert "2 runs compared" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{there}/none"], "not a run's folder"),
        (["{there}", "--out", "{there}/no/x.html"], "expected a file's name in a folder that exists"),
        (["{there}", "--base", "x"], "--base x has no effect on a run"),
        (["{there}/adapter", "--base", "nope/nope"], "nope/nope"),
        (["{there}/adapter", "--base", "{other}"], "layers"),
        (["{there}", "--host", "0.0.0.0"], "--host has no effect without --live"),
        (["{there}", "--port", "8765"], "--port has no effect without --live"),
        (["{there}", "--live", "--out", "x.html"], "--out x.html has no effect with --live"),
        (["{there}/adapter", "{there}"], "an adapter folder; report takes one alone"),
        (["{there}", "{there}"], "the same experiment with the same seed"),
        (["{there}", "--live", "--port", "99999"], "cannot listen there"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_reported_is_one_line(report, copied, tmp_path, words, said):
    folder, other = copied(), tmp_path / "gpt2"
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97).save_pretrained(other)
    code, out, error = report(*(word.format(there=folder, other=other) for word in words))
    assert (code, out) == (2, "")
    assert said in error
    assert "\n" not in error
