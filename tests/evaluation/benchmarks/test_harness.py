"""The harness's tasks through our model object: its own scores, prompts that fit, options that have an effect."""

import json
import logging
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheepfold.evaluation.benchmarks import harness
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.evaluation.benchmarks.shots import giving_way
from sheepfold.export import export
from tests.evaluation.benchmarks import data

SUBJECTS = ("anatomy", "virology")
LIMIT, NEW_TOKENS = 6, 8


@pytest.fixture(scope="module")
def merged(outcome, tmp_path_factory):
    """The run's merged model, in plain transformers, and its tokenizer."""
    place = export(outcome.folder, tmp_path_factory.mktemp("export") / "merged", to="merged")
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval(), AutoTokenizer.from_pretrained(place)


@pytest.fixture(scope="module")
def report(judge, folder):
    """GSM8K and MMLU under the federated adapter and the base."""
    tasks = ("gsm8k", *(f"mmlu_{subject}" for subject in SUBJECTS))
    names = ("federated", "base")
    return judge(*tasks, names=names, data=str(folder), limit=LIMIT, new_tokens=NEW_TOKENS, batch_rows=4)


def equal_scores(results, theirs):
    compared = 0
    for task, row in theirs["results"].items():
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                ours = results[task].scores[metric if kind == "none" else key]
                assert ours.value == value, (task, key)
                assert ours.stderr == row[f"{metric}_stderr,{kind}"]
                compared += 1
    return compared


def test_scores_equal_the_harness_alone_on_the_merged_export(report, merged, folder):
    theirs = data.direct(*merged, folder, SUBJECTS, LIMIT, NEW_TOKENS)
    assert equal_scores(report.results["federated"], theirs) == 4


def test_the_adapter_is_what_is_judged(report, answering, folder):
    with answering.using(["base"]) as model:
        theirs = data.direct(model, answering.base.tokenizer, folder, SUBJECTS, LIMIT, NEW_TOKENS)
    assert equal_scores(report.results["base"], theirs) == 4
    assert report.adapters == {"federated": answering.source.adapter_hash("federated"), "base": None}


def test_shots_give_way_one_by_one_from_the_last(judge, folder, answering):
    tasks = harness.load(["gsm8k"], Settings(tasks=("gsm8k",), data=str(folder)))
    task = tasks.tasks["gsm8k"]
    doc = task.eval_docs[0]

    def contexts(room):
        model = SimpleNamespace(fits=lambda request: len(request.args[0]) <= room)
        task.set_fewshot_seed(7)
        with giving_way(task, model) as shots:
            return [task.fewshot_context(doc, num_fewshot=5) for _ in range(2)], shots

    task.set_fewshot_seed(7)
    plain = [task.fewshot_context(doc, num_fewshot=5) for _ in range(2)]
    whole, counts = contexts(10_000)
    assert whole == plain
    assert counts.as_dict() == {"rows_by_shots": {"5": 2}, "cut": 0}
    short, counts = contexts(len(plain[0]) - 1)
    assert plain[0].startswith(short[0].removesuffix(short[0][short[0].rindex("Question:") :]))  # the first four
    assert short[0].count("Question:") == plain[0].count("Question:") - 1
    assert counts.given[4] >= 1
    _, counts = contexts(3)
    assert counts.as_dict() == {"rows_by_shots": {"0": 2}, "cut": 2}


def test_what_did_not_fit_is_counted_and_told(judge, folder, monkeypatch):
    monkeypatch.setattr("sheepfold.evaluation.benchmarks.harness_model.Model.max_length", 150)
    report = judge("gsm8k", data=str(folder), limit=LIMIT, new_tokens=NEW_TOKENS)
    prompts = report.results["federated"]["gsm8k"].facts["prompts"]
    assert sum(prompts["rows_by_shots"].values()) == LIMIT
    assert set(prompts["rows_by_shots"]) - {"5"}
    (note,) = report.notes()
    assert note.startswith("gsm8k: ")
    assert "too long for 5 shots" in note


def test_answers_leave_half_of_the_positions_to_the_prompt(judge, folder, monkeypatch):
    monkeypatch.setattr("sheepfold.evaluation.benchmarks.harness_model.Model.max_length", 100)
    report = judge("gsm8k", data=str(folder), limit=1, shots=0)
    assert report.results["federated"]["gsm8k"].facts["decoding"]["max_new_tokens"] == 50


def test_results_say_what_they_depend_on(report, tmp_path, answering, folder):
    path = tmp_path / "eval" / "here.json"
    report.write(path)
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["model"]["base"] == "builtin:tiny"
    assert told["model"]["fingerprint"] == answering.base.fingerprint
    assert told["run"] == {"name": "small", "rounds": 2}
    assert told["template"] == {"name": "chat", "benchmarks_too": False}
    assert told["settings"]["seed"] == 1234
    assert told["settings"]["limit"] == LIMIT
    assert {"lm-eval", "transformers", "torch"} <= told["versions"].keys()
    of_one = told["adapters"]["federated"]
    assert of_one["hash"] == answering.source.adapter_hash("federated")
    gsm8k = of_one["results"]["gsm8k"]
    assert gsm8k["rows"] == LIMIT
    assert gsm8k["shots"] == 5
    assert gsm8k["decoding"]["do_sample"] is False
    assert len(gsm8k["data"]["sha256"]) == 64
    assert set(gsm8k["metrics"]["numeric_match,flexible-extract"]) == {"value", "stderr"}
    assert told["adapters"]["base"]["hash"] is None


def test_a_template_goes_around_the_prompt(answering, folder):
    from sheepfold.data.wordings import WORDINGS
    from sheepfold.evaluation.benchmarks.harness_model import Model

    with answering.using(["base"]) as plain:
        model = Model(plain, answering.base.tokenizer, 2, WORDINGS["vicuna"])
    asked = [{"role": "system", "content": "About sheep.\n\n"}, {"role": "user", "content": "How many?"}]
    assert model.apply_chat_template(asked).endswith("USER: About sheep.\n\nHow many? ASSISTANT:")
    assert model.apply_chat_template(asked, scored=True).endswith(" ASSISTANT: ")
    begun = [*asked, {"role": "assistant", "content": "So many:"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith(" ASSISTANT: So many:")


def test_a_template_changes_what_is_asked(judge, folder, report):
    wrapped = judge("mmlu_anatomy", data=str(folder), limit=2, template=True)
    assert wrapped.as_dict()["template"]["benchmarks_too"] is True


def test_truthfulqa_is_built_from_its_table(judge, folder):
    result = judge("truthfulqa", data=str(folder), limit=4).results["federated"]
    assert list(result) == ["truthfulqa_mc1", "truthfulqa_mc2"]
    assert 0 <= result["truthfulqa_mc2"].scores["acc"].value <= 1


def test_the_harness_is_quiet_and_its_log_is_left_as_it_was(judge, folder, capfd):
    before = logging.getLogger("lm_eval").level
    judge("mmlu_anatomy", data=str(folder), limit=1)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == before
