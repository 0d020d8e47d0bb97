"""What is asked: names, options and files, found wanting before a model is loaded; and the experiment file's way."""

import json

import pytest

from sheepfold import cli
from sheepfold.config import build
from sheepfold.errors import ConfigError, DataError
from sheepfold.evaluation.benchmarks import after_run, catalogue
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.simulation import run
from tests.runs import experiment


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ()}, "no tasks"),
        ({"tasks": ("gsm9k",)}, "did you mean gsm8k"),
        ({"tasks": ("humanevall",)}, "did you mean humaneval"),
        ({"tasks": ("gsm8k:rows.jsonl",)}, "only exact_match"),
        ({"tasks": ("exact_match",)}, "say which with --data FILE"),
        ({"tasks": ("exact_match:no/rows.jsonl",)}, "no such file of rows"),
        ({"tasks": ("gsm8k",), "data": "/nowhere"}, "--data names the folder that holds gsm8k/train.jsonl"),
        ({"tasks": ("mmlu_anatomy",), "data": "/nowhere"}, "anatomy_dev.csv"),
        ({"tasks": ("gsm8k",), "limit": 0}, "--limit 0"),
        ({"tasks": ("gsm8k",), "samples": 5}, "add --temperature"),
        ({"tasks": ("gsm8k",), "samples": 5, "temperature": 0.2}, "--samples has no effect on gsm8k"),
        ({"tasks": ("gsm8k",), "fields": {"output": "x"}}, "--fields has no effect"),
        ({"tasks": ("gsm8k",), "allow_code": True}, "--allow-code has no effect"),
        ({"tasks": ("gsm8k",), "temperature": 0.5}, "--temperature has no effect"),
        ({"tasks": ("perplexity:rows.jsonl",), "shots": 2}, "--shots has no effect"),
        ({"tasks": ("perplexity:rows.jsonl",), "data": "x"}, "--data has no effect"),
        ({"tasks": ("humaneval",)}, "add --allow-code"),
        ({"tasks": ("humaneval_x_python",), "allow_code": True}, "--data FOLDER"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options, says):
    with pytest.raises((ConfigError, DataError)) as caught:
        catalogue.check(Settings(**options))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named_with_its_row(judge, tmp_path):
    for split, line in (("dev", "What?,a,b,c,d,A"), ("test", "What?,a,b,c,E")):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        (tmp_path / "mmlu" / split / f"anatomy_{split}.csv").write_text(line + "\n")
    with pytest.raises(DataError, match="row 0: 5 cells"):
        judge("mmlu_anatomy", data=str(tmp_path))


def test_more_shots_than_there_are_examples_are_refused(judge, folder):
    with pytest.raises(ConfigError, match="mmlu_anatomy has 5 examples"):
        judge("mmlu_anatomy", data=str(folder), shots=6)
    with pytest.raises(ConfigError, match="--shots has no effect"):
        judge("truthfulqa", data=str(folder), shots=1)


def test_unknown_tasks_and_missing_rows_are_found_before_anything_trains(tmp_path):
    over = {"evaluation.tasks": ["mmlu_anatomy"], "evaluation.task_data": str(tmp_path)}
    with pytest.raises(DataError, match=r"anatomy_dev\.csv"):
        run(experiment(tmp_path, **over))
    assert not (tmp_path / "runs").exists()


def test_options_of_tasks_need_tasks():
    with pytest.raises(ConfigError, match="task_limit has no effect without tasks"):
        build({"evaluation": {"task_limit": 3}})


def test_a_run_ends_with_its_benchmarks(tmp_path, folder):
    over = {"evaluation.tasks": ["mmlu_anatomy"], "evaluation.task_data": str(folder), "evaluation.task_limit": 4}
    told = {}
    asked = experiment(tmp_path, **over, **{"federation.rounds": 1, "evaluation.rows_per_client": 1})
    outcome = run(asked, listener=lambda event, facts: told.update({event: facts}))
    written = json.loads((outcome.folder / "eval" / after_run.FILE).read_text(encoding="utf-8"))
    figures = told["benchmarks"]["figures"]["mmlu_anatomy"]
    assert figures["metric"] == "acc"
    assert list(figures["values"]) == ["base", "federated"]
    federated = written["adapters"]["federated"]
    assert federated["hash"] == outcome.adapter.hash()
    assert federated["results"]["mmlu_anatomy"]["metrics"]["acc"]["value"] == figures["values"]["federated"]


def test_the_command_shows_a_table_and_keeps_the_results(outcome, folder, monkeypatch, capsys):
    words = ["eval", str(outcome.folder), "--tasks", "mmlu_anatomy", "--adapter", "base,federated"]
    monkeypatch.setattr("sys.argv", ["sheepfold", *words, "--data", str(folder), "--limit", "2", "--device", "cpu"])
    for number in ("", "-2"):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert (outcome.folder / "eval" / f"mmlu_anatomy-base-federated{number}.json").is_file()
    shown = capsys.readouterr().out
    assert "federated" in shown
    assert "mmlu_anatomy" in shown


def test_the_command_refuses_an_adapter_that_is_not_there(outcome, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sheepfold", "eval", str(outcome.folder), "--tasks", "gsm8k", "--adapter", "bset"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "no adapter 'bset'" in capsys.readouterr().err
