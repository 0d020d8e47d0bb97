"""Tasks over rows of one's own: the run's template, the metrics of training, no harness.

exact_match, rouge_l    answers are generated and compared with the row's
perplexity              nats per token of the row's answer, its end included, as the held-out loss counts them
choice                  of several answers, the one that is likeliest after the prompt
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sheepfold.answering.model import Answering
from sheepfold.answering.prompts import Prompt
from sheepfold.config import DataSettings, GenerationSettings
from sheepfold.data import files, sources
from sheepfold.data.records import COLUMNS, text
from sheepfold.data.rows import Record, TokenRows
from sheepfold.data.tokenize import tokenize
from sheepfold.errors import DataError, suggest
from sheepfold.evaluation import text_metrics
from sheepfold.evaluation.benchmarks.local_data import fingerprint
from sheepfold.evaluation.benchmarks.results import Score, TaskResult
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.metrics import Mean, merge, perplexity

ANSWERS = ("output", "answer", "label")
"""Where a choice row's right answer is looked for."""
NEW_TOKENS = 64
"""Longest answer where neither the command nor the run says."""


def run(task: str, place: Path, answering: Answering, name: str, settings: Settings) -> TaskResult:
    """Return one task's result over the rows of a file, under the adapter `name`. Raises DataError."""
    if task == "choice":
        return _choice(place, answering, name, settings)
    source = sources.read(DataSettings(source=str(place), fields=dict(settings.fields), rows=settings.limit))
    facts: dict[str, Any] = {"data": data_facts(place, source.dropped), "template": answering.template.name}
    facts["notes"] = [f"{count:,} rows {why} are left out" for why, count in source.dropped.items()]
    if task == "perplexity":
        return _perplexity(source.records, answering, name, settings, facts)
    return _generated(task, source.records, answering, name, settings, facts)


def check(task: str, place: Path, fields: Mapping[str, str]) -> None:
    """Find out what can be found without a model: whether the rows are there and have what the task needs."""
    known = [*COLUMNS, "choices"] if task == "choice" else list(COLUMNS)
    if wrong := [name for name in fields if name not in known]:
        raise DataError(f"--fields: {task} has no field {wrong[0]!r}; {suggest(wrong[0], known)}")
    if not place.exists():
        raise DataError(f"{place}: no such file of rows for {task}; name one with --data FILE or {task}:FILE")
    if task == "choice":
        _choice_rows(place, fields, 1)
    else:
        sources.read(DataSettings(source=str(place), fields=dict(fields), rows=1))


def data_facts(place: Path, dropped: Mapping[str, int]) -> dict[str, Any]:
    """Return which rows were read: enough to tell whether two results saw the same."""
    paths = [place] if place.is_file() else sorted(p for p in place.iterdir() if files.kind_of(p))
    return {"source": str(place), "sha256": fingerprint(paths), "dropped": dict(dropped)}


def _generated(
    task: str, records: Sequence[Record], answering: Answering, name: str, settings: Settings, facts: dict[str, Any]
) -> TaskResult:
    metric, generation = text_metrics.resolve(task), _generation(answering, settings)
    fitting: list[tuple[Record, Prompt]] = []
    for record in records:
        try:
            fitting.append((record, answering.prompt_of(record, generation.max_new_tokens)))
        except DataError:  # longer than the model's positions: counted below
            continue
    _some_left(len(fitting), len(records), generation.max_new_tokens)
    answers = answering.answer([p for _, p in fitting], [name], generation, seed=settings.seed)
    values = [metric(record, answer.text) for (record, _), answer in zip(fitting, answers, strict=True)]
    decoding = generation.model_dump(exclude={"batch_rows"})
    return TaskResult(
        {task: _score(values)},
        len(values),
        facts=_with(facts, {"decoding": decoding}, _left_out(len(records), len(values))),
    )


def _generation(answering: Answering, settings: Settings) -> GenerationSettings:
    run = answering.source.run
    usual = run.experiment().evaluation.generation if run else GenerationSettings(max_new_tokens=NEW_TOKENS)
    changes: dict[str, Any] = {"batch_rows": settings.batch_rows}
    if settings.new_tokens is not None:
        changes["max_new_tokens"] = settings.new_tokens
    if settings.temperature:
        changes |= {"temperature": settings.temperature, "beams": 1}
    return usual.model_copy(update=changes)


def _perplexity(
    records: Sequence[Record], answering: Answering, name: str, settings: Settings, facts: dict[str, Any]
) -> TaskResult:
    rows, kept = _tokens(records, answering)
    _some_left(len(kept), len(records), 0)
    means = _nats(rows, kept, answering, name, settings.batch_rows)
    loss = merge(means)
    scores = {"nats_per_token": Score(loss.value, _ratio_error(means, loss)), "perplexity": Score(perplexity(loss))}
    more = {"target_tokens": int(loss.count), **_left_out(len(records), len(kept))}
    return TaskResult(scores, len(kept), facts=_with(facts, more))


def _tokens(records: Sequence[Record], answering: Answering) -> tuple[TokenRows, list[int]]:
    """Return the records as training has them, and the numbers of those that fit the model whole."""
    limit = answering.max_positions or 1 << 30
    rows = tokenize(records, answering.base.tokenizer, answering.template, max_tokens=limit).rows
    return rows, [i for i in range(len(rows)) if not rows.cut[i]]


def _nats(rows: TokenRows, kept: Sequence[int], answering: Answering, name: str, batch_rows: int) -> list[Mean]:
    """Return each row's negative log-likelihood over its target tokens."""
    means = []
    for first in range(0, len(kept), batch_rows):
        part = kept[first : first + batch_rows]
        scored = answering.score([rows.row(i)[0] for i in part], [name], batch_rows=batch_rows)
        for i, scores in zip(part, scored, strict=True):
            targets = rows.is_target[rows.offsets[i] + 1 : rows.offsets[i + 1]]
            nats = torch.tensor([s.logprob for s, wanted in zip(scores, targets, strict=True) if wanted]).double()
            means.append(Mean(-float(nats.sum()), len(nats)))
    return means


def _choice(place: Path, answering: Answering, name: str, settings: Settings) -> TaskResult:
    rows = _choice_rows(place, settings.fields, settings.limit)
    records = [
        Record(question.instruction, choice, question.input) for question, choices, _ in rows for choice in choices
    ]
    tokens, kept = _tokens(records, answering)
    nats = dict(zip(kept, _nats(tokens, kept, answering, name, settings.batch_rows), strict=True))
    plain, normed, at = [], [], 0
    for _, choices, right in rows:
        own = [nats.get(at + i) for i in range(len(choices))]
        at += len(choices)
        if all(mean is not None for mean in own):
            whole = [mean for mean in own if mean is not None]
            plain.append(float(min(range(len(whole)), key=lambda i: whole[i].total) == right))
            normed.append(float(min(range(len(whole)), key=lambda i: whole[i].value) == right))
    _some_left(len(plain), len(rows), 0)
    facts = {"data": data_facts(place, {}), "template": answering.template.name, **_left_out(len(rows), len(plain))}
    return TaskResult({"acc": _score(plain), "acc_norm": _score(normed)}, len(plain), facts=facts)


def _choice_rows(place: Path, fields: Mapping[str, str], limit: int | None) -> list[tuple[Record, list[str], int]]:
    """Return (question, choices, index of the right one) of every row."""
    made: list[tuple[Record, list[str], int]] = []
    for chunk in files.read_path(place):
        for number, row in enumerate(chunk.rows):
            if limit is not None and len(made) >= limit:
                return made
            made.append(_choice_row(row, fields, f"{chunk.origin}, row {number}"))
    return made


def _choice_row(row: Mapping[str, Any], fields: Mapping[str, str], where: str) -> tuple[Record, list[str], int]:
    def cell(name: str, usual: Sequence[str]) -> Any:
        return next((row[column] for column in ([fields[name]] if name in fields else usual) if column in row), None)

    instruction = text(cell("instruction", [*COLUMNS["instruction"], "question"]))
    choices = _choices(cell("choices", ["choices"]), where)
    if not instruction:
        raise DataError(f"{where}: no instruction; its columns are {', '.join(row)}; set --fields instruction=COLUMN")
    right = _index(cell("output", ANSWERS), choices, where)
    return Record(instruction, choices[right], text(cell("input", COLUMNS["input"]))), choices, right


def _choices(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    found = [text(choice) for choice in value] if isinstance(value, list | tuple) else []
    if len(found) < 2 or not all(found):
        raise DataError(f"{where}: expected at least two choices, as a list (in a CSV cell: a JSON list), in `choices`")
    return found


def _index(answer: Any, choices: Sequence[str], where: str) -> int:
    """Return which choice is right: named by its text, else by its place counted from 0, else by its letter."""
    if isinstance(answer, bool) or answer is None:
        raise DataError(f"{where}: no right answer in {' or '.join(ANSWERS)}; set --fields output=COLUMN")
    told = str(answer).strip()
    if not isinstance(answer, int) and told in choices:
        return choices.index(told)
    if isinstance(answer, int) and told in choices and choices.index(told) != answer:
        raise DataError(f"{where}: the right answer {answer} is a choice and a place; give it as text, or a letter")
    place = int(told) if told.isdecimal() else ord(told.upper()) - ord("A") if len(told) == 1 else -1
    if not 0 <= place < len(choices):
        raise DataError(
            f"{where}: the right answer {told!r:.40} is none of its {len(choices)} choices; expected a choice's text, "
            "its place counted from 0, or its letter"
        )
    return place


def _with(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts together, with the notes of all."""
    notes = [note for part in parts for note in part.get("notes", ())]
    return {key: value for part in parts for key, value in part.items()} | ({"notes": notes} if notes else {})


def _some_left(left: int, rows: int, new_tokens: int) -> None:
    if left == 0:
        after = f" with {new_tokens} tokens to follow" if new_tokens else ""
        raise DataError(f"none of {rows} rows fits the model's positions{after}; lower --new-tokens, or shorten them")


def _left_out(rows: int, left: int) -> dict[str, Any]:
    if rows == left:
        return {"too_long": 0}
    return {
        "too_long": rows - left,
        "notes": [f"{rows - left:,} of {rows:,} rows are longer than the model's positions"],
    }


def _score(values: Sequence[float]) -> Score:
    """Return the mean and its standard error."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Score(mean)
    return Score(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count))


def _ratio_error(means: Sequence[Mean], whole: Mean) -> float | None:
    """Return the standard error of nats per token where rows, not tokens, are independent.

    Source: the ratio estimator's linearised variance; Cochran, Sampling Techniques, 1977, section 6.4.
    """
    count = len(means)
    if count < 2:
        return None
    residuals = sum((mean.total - whole.value * mean.count) ** 2 for mean in means)
    return math.sqrt(residuals / (count - 1) * count) / whole.count
