"""The doctor finds what was put there: cuts, lost answers, repeats, shared rows and leaks."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data import doctor
from sheepfold.data.prepare import prepare

Jsonl = Callable[..., Path]


@pytest.fixture
def report(tokenizer: Any, tmp_path: Path, jsonl: Jsonl) -> doctor.Report:
    def row(client: str, ask: str, answer: str = "yes") -> dict[str, str]:
        return {"instruction": ask, "output": answer, "client": client}

    train = [
        row("ann", "one"),
        row("ann", "one "),
        row("ann", "two"),
        row("ann", "long " * 80),
        row("ann", "x", "y " * 80),
    ]
    train += [row("bob", "two"), row("bob", "three"), row("bob", "held"), row("bob", "asked by ann")]
    jsonl(train, "train.jsonl")
    jsonl([row("ann", "asked by ann"), row("bob", "unique")], "eval.jsonl")
    settings = DataSettings(
        source=str(tmp_path), split="all", max_tokens=60, template="plain", partition=PartitionSettings(by="natural")
    )
    return doctor.examine(prepare(settings, tokenizer, None), tokenizer)


def test_every_fault_is_counted_where_it_is(report: doctor.Report) -> None:
    ann, bob = report.clients
    assert (ann.train_rows, ann.eval_rows, ann.rows_without_target) == (4, 1, 1)
    assert (ann.cut_rows, ann.repeated_rows, ann.shared_rows, ann.leaked_rows) == (2, 1, 2, 0)
    assert (bob.cut_rows, bob.repeated_rows, bob.shared_rows, bob.leaked_rows) == (0, 0, 2, 1)
    assert report.total().train_rows == 8
    assert [c.client for c in report.worst(1)] == ["ann"]


def test_the_example_is_one_row_and_says_what_is_learned(report: doctor.Report) -> None:
    assert report.example == (("<s>one\n", False), ("yes</s>", True))


def test_the_report_is_machine_readable(report: doctor.Report) -> None:
    values = json.loads(json.dumps(report.as_dict()))
    assert values["total"]["shared_rows"] == 4
    assert values["example"][1] == {"text": "yes</s>", "learned": True}


def test_the_report_prints_and_dims_what_is_not_learned(report: doctor.Report) -> None:
    text = StringIO()
    Console(file=text, width=120, force_terminal=True, color_system="standard").print(doctor.render(report))
    assert "no target" in text.getvalue()
    assert "\x1b[2m<s>one" in text.getvalue()


def test_many_clients_are_summed_up(tokenizer: Any, jsonl: Jsonl) -> None:
    path = jsonl(
        {"instruction": "a" if i % 30 < 3 else f"q{i}", "output": "b", "client": f"w{i % 30}"} for i in range(300)
    )
    settings = DataSettings(source=str(path), template="plain", partition=PartitionSettings(by="natural"))
    report = doctor.examine(prepare(settings, tokenizer, None), tokenizer)
    text = StringIO()
    Console(file=text, width=120).print(doctor.render(report, most=3))
    assert [c.client for c in report.worst(3)] == ["w0", "w1", "w2"]
    assert "3 clients with the most findings, of 30" in text.getvalue()
    assert "w29" not in text.getvalue()
