"""Tasks over one's own rows."""

import json
import math

import pytest
import torch

from sheepfold.errors import DataError
from sheepfold.evaluation import text_metrics
from sheepfold.evaluation.benchmarks import own_tasks

ROWS = [
    {"question": f"Which sheep is number {i}?", "reply": reply}
    for i, reply in enumerate(["the first", "the second", "the third one of them"])
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"question": "and?", "reply": None}]))
    return str(path)


FIELDS = {"instruction": "question", "output": "reply", "input": ""}


def test_perplexity_is_the_likelihood_of_the_answers_tokens(judge, answering, rows):
    from sheepfold.data.rows import IGNORED, Record
    from sheepfold.data.tokenize import tokenize

    result = judge("perplexity", data=rows, fields=FIELDS, batch_rows=2).results["federated"]["perplexity"]
    records = [Record(row["question"], row["reply"]) for row in ROWS]
    tokens = tokenize(records, answering.base.tokenizer, answering.template, max_tokens=512).rows
    nats = count = 0.0
    with answering.using(["federated"]) as model, torch.no_grad():
        for i in range(len(ROWS)):
            ids, labels = tokens.row(i)
            logits = model(ids[None]).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum"))
            count += int((labels[1:] != IGNORED).sum())
    assert result.scores["nats_per_token"].value == pytest.approx(nats / count, rel=1e-4)
    assert result.scores["perplexity"].value == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result.facts["target_tokens"] == count
    assert result.facts["data"]["dropped"] == {"without output": 1}


def test_generated_answers_are_scored_as_in_training(judge, answering, rows):
    from sheepfold.config import GenerationSettings
    from sheepfold.data.rows import Record

    result = judge("rouge_l", data=rows, fields=FIELDS, new_tokens=6).results["federated"]["rouge_l"]
    records = [Record(row["question"], row["reply"]) for row in ROWS]
    prompts = [answering.prompt_of(record, 6) for record in records]
    answers = answering.answer(prompts, ["federated"], GenerationSettings(max_new_tokens=6), seed=0)
    expected = text_metrics.score(text_metrics.rouge_l, records, [answer.text for answer in answers])
    assert result.scores["rouge_l"].value == pytest.approx(expected.value)


def test_the_likeliest_choice_is_taken(judge, answering, tmp_path):
    path = tmp_path / "choice.json"
    path.write_text(
        json.dumps([{"question": "Say yes.", "choices": ["yes", "no"], "answer": k} for k in (0, "no", "A")])
    )
    result = judge("choice", data=str(path), batch_rows=2).results["federated"]["choice"]
    said = 0 if result.scores["acc"].value > 0.5 else 1
    assert result.scores["acc"].value == pytest.approx(2 / 3 if said == 0 else 1 / 3)
    assert result.rows == 3


@pytest.mark.parametrize(("answer", "place"), [(1, 1), ("1", 1), ("B", 1), ("b", 1), ("two", 1), ("C", 2), (0, 0)])
def test_a_right_answer_is_a_text_a_place_or_a_letter(answer, place):
    row = {"question": "?", "choices": ["one", "two", "three"], "answer": answer}
    assert own_tasks._choice_row(row, {}, "here")[2] == place


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "none of its 2 choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": "d"}, "none of its 2 choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": None}, "no right answer"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "at least two choices"),
        ({"question": "?", "choices": "a, b", "answer": 0}, "a JSON list"),
        ({"ask": "?", "choices": ["a", "b"], "answer": 0}, "no instruction"),
    ],
)
def test_a_row_that_offers_no_choice_says_so(row, says):
    with pytest.raises(DataError, match=says):
        own_tasks._choice_row(row, {}, "rows.jsonl, row 0")


def test_rows_that_do_not_fit_are_counted(judge, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"instruction": "sheep " * n, "output": "yes"} for n in (1, 3000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = judge("perplexity", f"exact_match:{path}", data=str(path), new_tokens=2)
    assert report.results["federated"]["perplexity"].rows == 1
    assert len(report.notes()) == 2
    assert "1 of 2 rows are longer" in report.notes()[0]
