"""Benchmarks at the end of a run: a failure costs no run, what is there is not asked again, one base is in memory."""

import gc
import json
import shlex

import pytest
import torch
from transformers import LlamaForCausalLM

from sheepfold import cli
from sheepfold.config import build
from sheepfold.display import Terminal, json_lines
from sheepfold.errors import ConfigError, DataError
from sheepfold.evaluation.benchmarks import after_run
from sheepfold.evaluation.benchmarks.evaluate import evaluate
from sheepfold.simulation import run
from sheepfold.terminal import console
from tests.runs import experiment

SHORT = {"federation.rounds": 1, "train.steps": 1, "evaluation.rows_per_client": 1}


def rows(path, words=1):
    path.write_text(json.dumps({"instruction": "sheep " * words, "output": "yes"}) + "\n")
    return str(path)


def told_by(asked, **options):
    """Run an experiment; return what it came to and what was told, event by event."""
    told = []
    outcome = run(asked, listener=lambda event, facts: told.append((event, dict(facts))), **options)
    return outcome, dict(told)


def test_benchmarks_that_fail_cost_no_run_and_are_made_up_for(tmp_path, monkeypatch, capsys):
    """Rows that do not fit the model are found only when they are asked."""
    place = rows(tmp_path / "rows.jsonl", words=3000)
    asked = experiment(tmp_path, **SHORT, **{"evaluation.tasks": [f"perplexity:{place}"]})
    outcome, told = told_by(asked)
    assert (outcome.folder / "model_card.md").is_file()
    assert not (outcome.folder / "eval").exists()
    why = told["end"]["failed_benchmarks"]
    assert "none of 1 rows fits" in why
    assert told["benchmarks_failed"] == {"why": why, "again": told["benchmarks_failed"]["again"]}
    json_lines("benchmarks_failed", told["benchmarks_failed"])
    Terminal(console())("benchmarks_failed", told["benchmarks_failed"])
    assert capsys.readouterr().out.count("fits") == 2
    rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr("sys.argv", [*shlex.split(told["benchmarks_failed"]["again"]), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    written = json.loads((outcome.folder / "eval" / after_run.FILE).read_text())
    assert written["adapters"]["federated"]["hash"] == outcome.adapter.hash()


def test_a_finished_run_may_be_asked_other_tasks_and_asks_none_twice(tmp_path, monkeypatch):
    place = rows(tmp_path / "rows.jsonl")
    first, _ = told_by(experiment(tmp_path, **SHORT))
    more = experiment(tmp_path, **SHORT, **{"evaluation.tasks": [f"perplexity:{place}"], "evaluation.task_limit": 5})
    second, told = told_by(more, resume=True)
    assert second.folder == first.folder
    figures = told["benchmarks"]["figures"]["perplexity"]["values"]
    assert "perplexity" in (second.folder / "model_card.md").read_text()

    evaluations = []
    monkeypatch.setattr(
        "sheepfold.evaluation.benchmarks.evaluate.evaluate", lambda *a: evaluations.append(1) or evaluate(*a)
    )
    _, told = told_by(more, resume=True)
    assert not evaluations
    assert told["benchmarks"]["figures"]["perplexity"]["values"] == figures
    longer = more.model_copy(update={"evaluation": more.evaluation.model_copy(update={"task_limit": 4})})
    told_by(longer, resume=True)
    assert evaluations == [1]
    rows(tmp_path / "rows.jsonl", words=2)
    told_by(longer, resume=True)
    assert evaluations == [1, 1], "other rows are asked anew"

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sheepfold.evaluation.benchmarks.evaluate.evaluate", out_of_memory)
    _, told = told_by(more, resume=True)
    assert "lower --batch-rows" in told["end"]["failed_benchmarks"]


def live_bases():
    """Return how many models with weights are in memory."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, LlamaForCausalLM)]
    return sum(not next(model.parameters()).is_meta for model in found)


@pytest.mark.parametrize(("method", "most"), [("ia3", 1), ("full", 2)])
def test_a_run_through_peft_is_judged_with_one_base_in_memory(tmp_path, monkeypatch, method, most):
    """Full training: the base, and the model that it became."""
    place, before, most_seen = rows(tmp_path / "rows.jsonl"), live_bases(), []

    def counted(*args):
        report = evaluate(*args)
        most_seen.append(live_bases() - before)
        return report

    monkeypatch.setattr("sheepfold.evaluation.benchmarks.evaluate.evaluate", counted)
    over = {"adapter": {"method": method}, "train.engine": "peft_model", "evaluation.tasks": [f"perplexity:{place}"]}
    outcome, told = told_by(experiment(tmp_path, **SHORT, **over, **{"train.lr": 1e-3}))
    assert most_seen == [most]
    figures = told["benchmarks"]["figures"]["perplexity"]["values"]
    assert figures["base"] != figures["federated"]
    assert (outcome.folder / "eval" / after_run.FILE).is_file()


REFUSED = [
    ({"tasks": ["gsm8k"], "task_shots": 9999}, "evaluation.task_shots 9999: gsm8k has 12 examples"),
    ({"tasks": ["truthfulqa"], "task_shots": 3}, "evaluation.task_shots has no effect"),
    ({"tasks": ["mmlu_stem", "mmlu_anatomy"]}, "mmlu_anatomy is part of mmlu_stem and of mmlu_anatomy"),
    ({"tasks": ["gsm8k"], "task_new_tokens": 99999}, "evaluation.task_new_tokens 99999: the model has"),
    ({"tasks": ["exact_match:ROWS"], "task_new_tokens": 99999}, "evaluation.task_new_tokens 99999: the model has"),
    ({"tasks": ["perplexity:ROWS"], "task_new_tokens": 4}, "evaluation.task_new_tokens has no effect on perplexity"),
    ({"tasks": ["mmlu_anatomy"], "task_new_tokens": 4}, "evaluation.task_new_tokens has no effect on mmlu_anatomy"),
    ({"tasks": ["perplexity:ROWS"], "task_template": True}, "evaluation.task_template has no effect on perplexity"),
    ({"tasks": ["gsm8k"], "task_fields": {"output": "x"}}, "evaluation.task_fields has no effect on gsm8k"),
    ({"tasks": ["humaneval"]}, "add evaluation.allow_code to agree"),
    ({"tasks": ["exact_match"], "task_data": None}, "say which with evaluation.task_data FILE"),
    ({"tasks": ["gsm9k"]}, "`sheepfold eval --tasks list`"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_would_fail_after_training_is_refused_before_it_under_its_own_name(tmp_path, folder, options, says):
    tasks = [task.replace("ROWS", rows(tmp_path / "rows.jsonl")) for task in options["tasks"]]
    data = {} if ":" in tasks[0] else {"task_data": str(folder)}
    asked = {f"evaluation.{key}": value for key, value in ({**data, **options} | {"tasks": tasks}).items()}
    with pytest.raises((ConfigError, DataError)) as caught:
        run(experiment(tmp_path, **asked))
    assert says in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow  # the harness reads all its definitions for a task that we do not know
def test_tasks_that_would_run_programs_here_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="mbpp: the harness would run generated programs in this process"):
        run(experiment(tmp_path, **{"evaluation.tasks": ["mbpp"]}))


def test_rows_that_the_hub_does_not_give_are_missed_before_training(tmp_path):
    with pytest.raises(DataError, match=r"gsm8k: the rows cannot be had .* evaluation\.task_data reads them"):
        run(experiment(tmp_path, **{"evaluation.tasks": ["gsm8k"]}))


@pytest.mark.parametrize("option", [{"task_shots": 0}, {"task_limit": 3}, {"task_fields": {"a": "b"}}])
def test_options_of_tasks_have_no_effect_without_tasks(option):
    with pytest.raises(ConfigError, match="has no effect without tasks"):
        build({"evaluation": option})
