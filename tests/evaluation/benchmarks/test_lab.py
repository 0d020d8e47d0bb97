"""Real benchmark rows, in the layouts beside the project: our scores are the harness's own on the merged export."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheepfold.evaluation.benchmarks import code_tasks
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.evaluation.code import harness_tasks as code
from sheepfold.export import export
from tests.evaluation.benchmarks import data
from tests.evaluation.benchmarks.test_harness import equal_scores

pytestmark = pytest.mark.lab
SUBJECTS = ("abstract_algebra", "anatomy", "moral_disputes", "virology")
LIMIT, NEW_TOKENS = 12, 32


@pytest.fixture
def answers(monkeypatch):
    """What the harness kept of every row, {task: samples}, of our last evaluation."""
    import lm_eval.evaluator

    kept: dict[str, object] = {}
    plain = lm_eval.evaluator.evaluate

    def keeping(*args, log_samples, **kwargs):
        found = plain(*args, log_samples=True, **kwargs)
        kept.update(found["samples"])
        return found

    monkeypatch.setattr("lm_eval.evaluator.evaluate", keeping)
    return kept


def test_answers_to_published_rows_equal_the_harness_alone_on_the_merged_export(lab, judge, outcome, tmp_path, answers):
    tasks = ("gsm8k", *(f"mmlu_{subject}" for subject in SUBJECTS))
    report = judge(*tasks, data=str(lab / "data"), limit=LIMIT, new_tokens=NEW_TOKENS, shots=1)
    results, ours = report.results["federated"], dict(answers)
    assert all(results[task].facts["prompts"] == {"rows_by_shots": {"1": LIMIT}, "cut": 0} for task in tasks)
    place = export(outcome.folder, tmp_path / "merged", to="merged")
    model = AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    theirs = data.direct(model, tokenizer, lab / "data", SUBJECTS, LIMIT, NEW_TOKENS, shots=1)
    assert equal_scores(results, theirs) == 2 + len(SUBJECTS)
    for task in tasks:
        for mine, other in zip(ours[task], theirs["samples"][task], strict=True):
            assert [args[0] for args in mine["arguments"]] == [args[0] for args in other["arguments"]]  # prompts
            if task == "gsm8k":
                assert mine["resps"] == other["resps"]  # texts
            else:
                nats = [[nat for ((nat, _),) in sample["resps"]] for sample in (mine, other)]
                assert nats[0] == pytest.approx(nats[1], abs=1e-4)


@pytest.mark.slow
def test_all_of_mmlu_adds_up_by_rows(lab, judge):
    results = judge("mmlu", data=str(lab / "data"), limit=2, shots=0).results["federated"]
    whole, groups = results["mmlu"], [results[name] for name in results["mmlu"].members]
    assert len(groups) == 4
    assert whole.rows == sum(group.rows for group in groups) == 57 * 2
    mean = sum(group.scores["acc"].value * group.rows for group in groups) / whole.rows
    assert whole.scores["acc"].value == pytest.approx(mean)
    assert whole.facts["prompts"]["rows_by_shots"] == {"0": 114}


def test_truthfulqa_and_humaneval_run_from_local_files(lab, judge):
    results = judge("truthfulqa", "humaneval", data=str(lab / "data"), limit=2, new_tokens=8, allow_code=True).results[
        "federated"
    ]
    assert list(results) == ["truthfulqa_mc1", "truthfulqa_mc2", "humaneval"]
    assert list(results["humaneval"].scores) == ["pass@1"]
    assert results["humaneval"].facts["isolation"]


@pytest.mark.parametrize("language", ["cpp", "rust"])
def test_problems_that_need_what_this_machine_lacks_are_left_out_by_name(lab, language):
    if why := code.skipped(language):
        pytest.skip(why)
    settings = Settings(tasks=("humaneval_x",), data=str(lab / "data"), allow_code=True)
    (task,), notes = code_tasks.tasks([f"humaneval_x_{language}"], settings)
    held = code.documents(lab / "data" / "humaneval_x", language, "humaneval_x")
    left = {doc["task_id"] for doc in held} - {doc["task_id"] for doc in task.eval_docs}
    assert len(left) == len(notes) == sum(code.unscorable(doc) is not None for doc in held)
    assert all(any(note.startswith(name) for note in notes) for name in left)
