"""Benchmark data from a local folder, in the layouts in which it is published.

    gsm8k/{train,test}.jsonl[.gz]    mmlu/{dev,test}/<subject>_{dev,test}.csv    truthfulqa/TruthfulQA.csv

Each reader returns what the hub's data set would hold, {split: datasets.Dataset}, so that the harness's own task runs
on it unchanged.
"""

import csv
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sheepfold.data.files import read_path
from sheepfold.errors import DataError

LETTERS = "ABCD"


def find(folder: str | Path, name: str) -> Path:
    """Return the file of this name below the folder, or the same with .gz; raises DataError where there is neither."""
    plain = Path(folder).expanduser() / name
    for path in (plain, plain.with_name(plain.name + ".gz")):
        if path.is_file():
            return path
    raise DataError(f"{plain}: no such file, nor {plain.name}.gz; --data names the folder that holds {name}")


def gsm8k(folder: str, **_: Any) -> dict[str, Any]:
    """Return GSM8K: question and answer."""
    splits = {split: _json_rows(path) for split, path in zip(("train", "test"), gsm8k_files(folder), strict=True)}
    return {split: _dataset(rows, ("question", "answer"), split) for split, rows in splits.items()}


def gsm8k_files(folder: str) -> list[Path]:
    """Return the files that gsm8k reads; shots come from the training file."""
    return [find(folder, f"gsm8k/{split}.jsonl") for split in ("train", "test")]


def mmlu(folder: str, subject: str, **_: Any) -> dict[str, Any]:
    """Return one subject of MMLU: question, subject, choices and the answer's index."""
    files = zip(("dev", "test"), mmlu_files(folder, subject), strict=True)
    return {split: _from(_mmlu_rows(path, subject)) for split, path in files}


def mmlu_files(folder: str, subject: str) -> list[Path]:
    """Return the files that a subject reads; shots come from dev."""
    return [find(folder, f"mmlu/{split}/{subject}_{split}.csv") for split in ("dev", "test")]


def truthfulqa(folder: str, **_: Any) -> dict[str, Any]:
    """Return TruthfulQA's multiple choice, built from the published table as its authors build it.

    mc1: the best answer against all incorrect ones; mc2: all correct answers against all incorrect ones.
    """
    (path,) = truthfulqa_files(folder)
    return {"validation": _from([_truthful(row, f"{path}, row {i}") for i, row in enumerate(_table(path))])}


def truthfulqa_files(folder: str) -> list[Path]:
    """Return the file that truthfulqa reads."""
    return [find(folder, "truthfulqa/TruthfulQA.csv")]


def fingerprint(files: Iterable[Path]) -> str:
    """Return one file's sha256, or the sha256 of the list `<sha256>  <name>` of several, by name."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()).hexdigest()


def _json_rows(path: Path) -> list[Mapping[str, Any]]:
    return [row for chunk in read_path(path) for row in chunk.rows]


def _dataset(rows: list[Mapping[str, Any]], columns: tuple[str, ...], where: str) -> Any:
    for number, row in enumerate(rows):
        if missing := [column for column in columns if not isinstance(row.get(column), str)]:
            raise DataError(f"gsm8k {where}, row {number}: {missing[0]} is no text; expected {' and '.join(columns)}")
    return _from([{column: row[column] for column in columns} for row in rows])


def _from(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _mmlu_rows(path: Path, subject: str) -> list[dict[str, Any]]:
    """Return the rows of a file without a header: question, four choices, the answer's letter."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file)):
            if len(cells) != 6 or cells[5].strip() not in tuple(LETTERS):
                raise DataError(
                    f"{path}, row {number}: {len(cells)} cells, the last {cells[-1] if cells else ''!r:.20}; expected "
                    "a question, four choices and A, B, C or D"
                )
            answer = LETTERS.index(cells[5].strip())
            rows.append({"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": answer})
    if not rows:
        raise DataError(f"{path}: holds no questions")
    return rows


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _truthful(row: Mapping[str, str | None], where: str) -> dict[str, Any]:
    columns = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    if missing := [column for column in columns if not row.get(column)]:
        raise DataError(f"{where}: no {missing[0]!r}; expected TruthfulQA.csv with {', '.join(columns)}")
    question, best, true, false = ((row[column] or "").strip() for column in columns)
    wrong = _split(false)
    return {
        "question": question,
        "mc1_targets": _targets([best], wrong),
        "mc2_targets": _targets(_split(true), wrong),
    }


def _targets(right: list[str], wrong: list[str]) -> dict[str, Any]:
    return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}


def _split(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]
