"""A small folder of benchmark data in the published layouts, and the harness run on it without us."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

LETTERS = "ABCD"


def write(folder: Path, questions: int = 6) -> Path:
    """Write GSM8K, two subjects of MMLU, TruthfulQA and one HumanEval problem; return the folder."""
    _gsm8k(folder / "gsm8k", questions)
    for subject in ("anatomy", "virology"):
        for split, count in (("dev", 5), ("test", questions)):
            path = folder / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(_mmlu_row(subject, i) for i in range(count))
    (folder / "truthfulqa").mkdir()
    with open(folder / "truthfulqa" / "TruthfulQA.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
        )
        for i in range(questions):
            writer.writerow(["A", "B", f"Can {i} pigs fly?", "No", "No; Never, they cannot", "Yes; Some; Often", "us"])
    return folder


def _gsm8k(folder: Path, questions: int) -> None:
    folder.mkdir(parents=True)
    train = [{"question": f"{i} sheep and {i} goats?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(12)]
    test = [{"question": f"{n} sheep, {'no goats, ' * n}one dog?", "answer": f"#### {n + 1}"} for n in range(questions)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in test))


def _mmlu_row(subject: str, i: int) -> list[str]:
    return [
        f"Which letter, in {subject}, follows from {i}?",
        "one, or so",
        "two\nlines",
        "three",
        "four",
        LETTERS[i % 4],
    ]


def direct(
    model: Any, tokenizer: Any, folder: Path, subjects: tuple[str, ...], limit: int, new_tokens: int, shots: int = 5
) -> Any:
    """Return what the harness itself says of GSM8K and MMLU, its own task files over its own readers of the rows.

    model: in memory. Nothing of ours takes part.
    """
    import lm_eval.tasks
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    root = Path(lm_eval.tasks.__file__).parent
    stock = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / "gsm8k", root / "mmlu" / "default"])
    specs = []
    for name in ("gsm8k", *(f"mmlu_{subject}" for subject in subjects)):
        rows = _gsm8k_files(folder) if name == "gsm8k" else _mmlu_files(folder, name.removeprefix("mmlu_"))
        specs.append(
            {k: v for k, v in stock.task_index[name].cfg.items() if k != "tag"} | {"dataset_name": None} | rows
        )
    loaded = stock.load(specs)
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": new_tokens}, update=True)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    return evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=True)


def _gsm8k_files(folder: Path) -> dict[str, Any]:
    files = {split: str(next((folder / "gsm8k").glob(f"{split}.jsonl*"))) for split in ("train", "test")}
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}


def _mmlu_files(folder: Path, subject: str) -> dict[str, Any]:
    files = {split: str(folder / "mmlu" / split / f"{subject}_{split}.csv") for split in ("dev", "test")}
    columns = ["question", "a", "b", "c", "d", "letter"]
    return {
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": files, "column_names": columns, "keep_default_na": False},
        "process_docs": _documents,
        "fewshot_config": {"sampler": "first_n", "process_docs": _documents},
    }


def _documents(rows: Any) -> Any:
    return rows.map(lambda r: {"choices": [r["a"], r["b"], r["c"], r["d"]], "answer": LETTERS.index(r["letter"])})
