"""Every format and field: rows mean the same however they were written, and each fault is one line."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data import files
from sheepfold.data.glue import GLUE
from sheepfold.data.rows import Message, Record
from sheepfold.data.sources import NAMED, read
from sheepfold.errors import ConfigError, DataError

ROWS = [
    {"instruction": "Add", "input": "1 2", "output": "007", "category": "maths"},
    {"instruction": "When?", "input": None, "output": "1990-01-01", "category": "dates"},
    {"instruction": "Why?", "input": "  ", "output": "None", "category": "dates"},
    {"instruction": 'Say "so",\nplease', "output": "so", "category": "talk"},
]
RECORDS = [
    Record("Add", "007", "1 2", "maths"),
    Record("When?", "1990-01-01", "", "dates"),
    Record("Why?", "None", "", "dates"),
    Record('Say "so",\nplease', "so", "", "talk"),
]
Jsonl = Callable[..., Path]


def settings(source: Path | str, **values: Any) -> DataSettings:
    return DataSettings(source=str(source), **values)


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output", "category"])
        writer.writeheader()
        writer.writerows([{key: value or "" for key, value in row.items()} for row in ROWS])


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "bom.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig"),
    "rows.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    ),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "ro[w]s *.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(settings(tmp_path / name)).records == RECORDS


def test_tsv_is_read_without_quoting(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('instruction\toutput\n"quoted\tNA\nplain\t"\n')
    assert read(settings(path)).records == [Record('"quoted', "NA"), Record("plain", '"')]


def test_gzipped_csv_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress("\ufeffinstruction,output\nask,answer\n".encode()))
    assert read(settings(path)).records == [Record("ask", "answer")]


def test_an_edited_file_is_read_anew(jsonl: Jsonl) -> None:
    import os

    path = jsonl([{"instruction": "a", "output": "b"}])
    read(settings(path))
    then = path.stat()
    jsonl([{"instruction": "a", "output": "c"}])
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))  # same size, same time: only the bytes tell
    assert read(settings(path)).records == [Record("a", "c")]


def test_a_field_map_names_the_columns(jsonl: Jsonl) -> None:
    path = jsonl([{"q": "ask", "a": ["two", "tokens"], "topic": 3, "ward": "w1", "input": "not this"}])
    fields = {"instruction": "q", "output": "a", "category": "topic", "client": "ward", "input": ""}
    assert read(settings(path, fields=fields)).records == [Record("ask", "two tokens", "", "3", "w1")]


def test_the_partition_column_becomes_the_category_and_of_natural_clients_the_client(jsonl: Jsonl) -> None:
    path = jsonl([{"instruction": "a", "output": "b", "language": "Go"}])
    by_label = read(settings(path, partition=PartitionSettings(by="shards", column="language"))).records[0]
    by_owner = read(settings(path, partition=PartitionSettings(by="natural", column="language"))).records[0]
    assert (by_label.category, by_label.client) == ("Go", "")
    assert (by_owner.category, by_owner.client) == ("", "Go")


def test_rows_without_an_answer_are_left_out_and_counted(jsonl: Jsonl) -> None:
    rows = [{"instruction": "a", "output": None}, {"instruction": "a", "output": " \n"}, {"instruction": "a"}]
    source = read(settings(jsonl([*rows, {"instruction": "a", "output": "b"}, {"instruction": "", "output": "c"}])))
    assert source.records == [Record("a", "b")]
    assert source.dropped == {"without output": 3, "without instruction": 1}
    assert source.numbers.tolist() == [3]


def test_texts_without_instructions_are_rows_where_the_map_says_so(jsonl: Jsonl) -> None:
    path = jsonl([{"text": "Once upon a time"}])
    assert read(settings(path, fields={"instruction": "", "output": "text"})).records == [
        Record("", "Once upon a time")
    ]


def test_conversations_are_read_in_both_dialects_and_end_with_an_answer(jsonl: Jsonl) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = jsonl([{"messages": turns}, {"messages": [*turns, {"role": "user", "content": "c"}]}])
    plain = (Message("user", "a"), Message("assistant", "b"))
    assert read(settings(path)).records == [Record("a", "b", messages=plain)] * 2
    path = jsonl([{"conversations": shared}], "shared.jsonl")
    assert read(settings(path)).records == [Record("a", "b", messages=(Message("system", "s"), *plain))]


def test_conversations_that_do_not_alternate_are_left_out_and_counted(jsonl: Jsonl) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": good}, {"messages": good[1:]}, {"messages": good[:1]}, {"messages": [*good[:1], *good]}]
    source = read(settings(jsonl(rows)))
    assert len(source.records) == 1
    assert source.dropped == {"whose turns do not alternate between user and assistant": 2, "without output": 1}


def test_rows_takes_the_first_and_subsample_a_share_of_every_category(jsonl: Jsonl) -> None:
    path = jsonl({"instruction": "a", "output": str(i), "category": "ab"[i % 20 == 0]} for i in range(100))
    assert [r.output for r in read(settings(path, rows=3)).records] == ["0", "1", "2"]
    kept = read(settings(path, subsample=0.1)).records
    assert sorted(r.category for r in kept) == ["a"] * 10 + ["b"]
    assert kept == read(settings(path, subsample=0.1)).records
    assert kept != read(settings(path, subsample=0.1, seed=1)).records


def test_the_corpus_makes_as_many_rows_as_it_is_asked_for() -> None:
    records = read(DataSettings(rows=16)).records
    assert len(records) == 16
    assert len({record.category for record in records}) == 8


def test_a_folder_of_split_files_gives_one_split_or_all(jsonl: Jsonl, tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        jsonl([{"instruction": name, "output": "x"}], f"{name}.jsonl")
    assert [r.instruction for r in read(settings(tmp_path)).records] == ["train"]
    assert [r.instruction for r in read(settings(tmp_path, split="test")).records] == ["test"]
    source = read(settings(tmp_path, split="all"))
    assert dict(zip((r.instruction for r in source.records), source.splits, strict=True)) == {
        "train": "train",
        "validation": "eval",
        "test": "test",
    }


def test_per_client_files_know_their_client_and_split(tmp_path: Path) -> None:
    for name in ("local_training_3", "local_eval_3", "local_training_12", "global_test", "global_training"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": name, "context": "", "response": "x"}]))
    source = read(DataSettings(source="natural-instructions", path=str(tmp_path)))
    found = {r.instruction: (r.client, split) for r, split in zip(source.records, source.splits, strict=True)}
    assert found == {
        "local_training_3": ("3", "train"),
        "local_eval_3": ("3", "eval"),
        "local_training_12": ("12", "train"),
        "global_test": ("", "holdout"),
    }


NAMED_ROWS = {
    "dolly": ({"instruction": "a", "context": "c", "response": "b", "category": "qa"}, Record("a", "b", "c", "qa")),
    "alpaca": ({"instruction": "a", "input": "c", "output": "b", "text": "t"}, Record("a", "b", "c")),
    "alpaca-cleaned": ({"instruction": "a", "input": "", "output": "b"}, Record("a", "b")),
    "gsm8k": ({"question": "a", "answer": "x\n#### 72"}, Record("a", "x\n#### 72")),
    "gsm8k-answer-is": ({"question": "a", "answer": "x\n#### 72"}, Record("a", "x\nThe answer is 72")),
    "code-alpaca": ({"instruction": "a", "input": "c", "output": "b"}, Record("a", "b", "c")),
    "rosetta-alpaca": ({"instruction": "a\u00a0", "input": "Go", "output": "b"}, Record("a", "b", "Go", "Go")),
    "code-search-net": ({"docstring": "Sort.", "language": "go", "code": "f"}, Record("go Sort.", "f", "go", "go")),
    "natural-instructions": (
        {"definition": "a", "inputs": "c", "targets": "b", "task_name": "t1"},
        Record("a", "b", "c", "t1", "t1"),
    ),
    **{
        name: (
            dict.fromkeys(task.first[:1], "a") | dict.fromkeys(task.second[:1], "c") | {"label": 1},
            Record("a", task.labels[1], "c" if task.second else "", task.labels[1]),
        )
        for name, task in GLUE.items()
    },
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_set_knows_its_fields(jsonl: Jsonl, name: str) -> None:
    row, record = NAMED_ROWS[name]
    assert read(DataSettings(source=name, path=str(jsonl([row])))).records == [record]


@pytest.mark.parametrize("name", ["dolly", "gsm8k", "owner/set:config@v1"])
def test_hub_sets_go_through_the_same_loader(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(path: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.update(path=path, config=config, split=split, revision=revision)
        return datasets.Dataset.from_list([{"instruction": "a", "question": "a", "answer": "b", "response": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [(r.instruction, r.output) for r in read(DataSettings(source=name)).records] == [("a", "b")]
    assert (
        asked
        == {
            "dolly": {"path": "databricks/databricks-dolly-15k", "config": None, "split": "train", "revision": None},
            "gsm8k": {"path": "openai/gsm8k", "config": "main", "split": "train", "revision": None},
            "owner/set:config@v1": {"path": "owner/set", "config": "config", "split": "train", "revision": "v1"},
        }[name]
    )


def made(data: DataSettings) -> Iterator[dict[str, str] | Record]:
    yield {"instruction": "a", "response": "b", "client": "w1"}


def broken(data: DataSettings) -> list[int]:
    return [1]


def test_an_own_function_is_a_source() -> None:
    assert read(DataSettings(source="tests.data.test_sources:made")).records == [Record("a", "b", client="w1")]


def test_a_hub_set_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dolly-15k.*set data\.path to a local copy"):
        read(DataSettings(source="dolly"))


FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["no rows"]),
    "empty.json": (b"[]", ["no rows"]),
    "empty.csv": (b"", ["is empty", "header"]),
    "header.csv": (b"instruction,output\n", ["no rows"]),
    "line.jsonl": (b'{"instruction": "a", "output": "b"}\n{"instruction": \n', ["line 2", "not valid JSON"]),
    "array.json": (b'[{"instruction": "a"},\n{"instruction" "b"}]', ["line 2", "not valid JSON"]),
    "numbers.json": (b"[1, 2]", ["element 0 is a int"]),
    "latin.jsonl": ('{"instruction": "a", "output": "caf\xe9"}\n'.encode("latin-1"), ["line 1", "not UTF-8"]),
    "latin.csv": ("instruction,output\na,caf\xe9\n".encode("latin-1"), ["not UTF-8"]),
    "cut.jsonl.gz": (gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 500)[:-20], ["truncated"]),
    "plain.jsonl.gz": (b'{"instruction": "a"}\n', ["not gzip-compressed"]),
    "not.parquet": (b"PAR1 but no more", ["not a readable parquet file"]),
    "twice.csv": (b"output,output\na,b\n", ["'output' occurs twice"]),
    "ragged.csv": (b"instruction,output\na,b\na,b,c,d\n", ["line 3"]),
    "rows.xlsx": (b"PK", ["data files end in .json", "'rows.xlsx'"]),
    "no_output.jsonl": (
        b'{"instruction": "a", "outptu": "b"}\n',
        ["no column for output", "'outptu'", "data.fields.output"],
    ),
    "all_null.jsonl": (
        b'{"instruction": "a", "output": null}\n',
        ["no usable row", "1 without output", "output = 'output'"],
    ),
    "turns.jsonl": (b'{"messages": "hello"}\n', ["row 0", "messages is a str"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    content, words = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(settings(tmp_path / name))
    line = str(error.value)
    assert name in line
    assert "\n" not in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": "doly"}, ["did you mean 'dolly'", "hub id"]),
        ({"source": "missing.jsonl"}, ["missing.jsonl: no such file"]),
        ({"source": "./nowhere"}, ["no such file or folder"]),
        ({"source": "tests.data.test_sources:broken"}, ["a row is a int"]),
        ({"source": "tests.data.test_sources:missing"}, ["has no 'missing'"]),
        ({"source": "corpus", "path": "x"}, ["has no effect"]),
        ({"source": "dolly", "path": "nowhere.json"}, ["nowhere.json: no such file"]),
        ({"source": "dolly", "fields": {"instructoin": "q"}}, ["did you mean 'instruction'"]),
        (
            {"source": "dolly", "fields": {"category": "a"}, "partition": PartitionSettings(column="b")},
            ["name two columns"],
        ),
    ],
)
def test_settings_that_lead_nowhere_are_one_line(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((DataError, ConfigError)) as error:
        read(DataSettings(**values))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_mapped_column_that_is_missing_lists_the_nearest_first(jsonl: Jsonl) -> None:
    path = jsonl([{"question": "a", "answer": "b", "zzz": 1}])
    with pytest.raises(DataError, match=r"no column 'qestion' for instruction; did you mean 'question'\?"):
        read(settings(path, fields={"instruction": "qestion", "output": "answer"}))


def test_folders_say_what_they_lack(tmp_path: Path, jsonl: Jsonl) -> None:
    (tmp_path / "10").mkdir()
    with pytest.raises(DataError, match=r"no data files .* it has the folders 10"):
        read(settings(tmp_path))
    jsonl([{"instruction": "a", "output": "b"}], "train.jsonl")
    with pytest.raises(DataError, match=r"no split 'tset'.*train"):
        read(settings(tmp_path, split="tset"))
    with pytest.raises(DataError, match="one file has only the split 'train'"):
        read(settings(tmp_path / "train.jsonl", split="test"))


def test_hub_ids_are_told_from_files() -> None:
    assert files.is_hub_id("owner/name")
    assert not files.is_hub_id("folder/rows.jsonl")
    assert not files.is_hub_id("a/b/c")


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "\\ud83d\\ude00 ok", "output": "\\ud83d broken"}\n')
    assert read(settings(path)).records == [Record("😀 ok", "\ufffd broken")]
