"""The published sets, whole, where they lie beside the project."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data import split_files, table
from sheepfold.data.prepare import partition_only, prepare
from sheepfold.data.sources import read

pytestmark = pytest.mark.lab

DOLLY = {
    "brainstorming": 1_766,
    "classification": 2_136,
    "closed_qa": 1_773,
    "creative_writing": 709,
    "general_qa": 2_191,
    "information_extraction": 1_506,
    "open_qa": 3_742,
    "summarization": 1_188,
}


def dolly(lab: Path, **values: Any) -> DataSettings:
    return DataSettings(source="dolly", path=str(lab / "data/dolly"), **values)


def test_dolly_in_shepherds_shards_for_ten_clients(lab: Path) -> None:
    data = partition_only(dolly(lab, partition=PartitionSettings(by="shards", clients=10, holdout_per_category=10)))
    assert Counter(record.category for record in data.records) == DOLLY
    assert sum(1 for record in data.records if not record.input) == 10_544
    assert len(data.holdout) == 80
    counted = table.counts(data)
    assert counted.rows.sum() == 14_931
    assert all(1_492 <= rows <= 1_494 for rows in counted.rows.sum(axis=1))
    assert all((row > 0).sum() <= 4 for row in counted.rows)  # two shards of 746 rows touch four categories at most


def test_shepherds_published_partition_is_read_from_its_file(lab: Path) -> None:
    path = lab / "data/dolly/partition_10.json"
    data = partition_only(dolly(lab, partition=PartitionSettings(by=str(path))))
    lists = json.loads(path.read_text())
    assert data.holdout.tolist() == sorted(lists["test"])
    for name, split in data.clients.items():
        assert sorted([*split.train, *split.eval]) == sorted(lists[name])


def test_dolly_by_dirichlet_as_shepherd_draws_it(lab: Path) -> None:
    part = PartitionSettings(by="dirichlet", clients=10, alpha=0.5, min_rows=40)
    counted = table.counts(partition_only(dolly(lab, partition=part)))
    assert counted.rows.sum() == 15_011
    assert counted.rows.sum(axis=1).min() >= 40


def test_dolly_by_meta_gives_eight_clients_a_category_each(lab: Path) -> None:
    counted = table.counts(partition_only(dolly(lab, partition=PartitionSettings(by="meta", clients=8))))
    assert sorted(counted.rows.sum(axis=1)) == sorted(DOLLY.values())


def test_natural_instructions_has_1553_clients_with_their_own_splits(lab: Path) -> None:
    settings = DataSettings(
        source="natural-instructions",
        path=str(lab / "data/natural_instructions_1613"),
        partition=PartitionSettings(by="natural"),
    )
    data = partition_only(settings)
    assert len(data.clients) == 1_553
    assert list(data.clients)[:3] == ["0", "1", "2"]
    assert list(data.clients)[-1] == "1612"
    sizes = [sum(len(getattr(split, part)) for split in data.clients.values()) for part in ("train", "eval", "test")]
    assert sum(sizes) + data.dropped["without output"] == 27_240
    assert all(len({data.records[row].instruction for row in split.train}) == 1 for split in data.clients.values())


def test_other_named_sets_read_their_published_fields(lab: Path) -> None:
    counts = {
        "alpaca/train.jsonl.gz": "alpaca-cleaned",
        "gsm8k": "gsm8k",
        "codealpaca/code_alpaca_2k.jsonl.gz": "code-alpaca",
    }
    for path, name in counts.items():
        records = read(DataSettings(source=name, path=str(lab / "data" / path), rows=50)).records
        assert len(records) == 50
        assert all(record.instruction and record.output and record.output != "None" for record in records)
    assert len(read(DataSettings(source="gsm8k", path=str(lab / "data/gsm8k"))).records) == 7_473


def test_cloze_files_are_a_partition_by_language(lab: Path) -> None:
    settings = DataSettings(
        source=str(lab / "data/codesearchnet_cloze"),
        fields={"instruction": "nl_tokens", "output": "pl_tokens"},
        partition=PartitionSettings(by="files"),
    )
    data = partition_only(settings)
    assert list(data.clients) == ["go", "java", "javascript", "php", "python", "ruby"]


def test_dolly_is_tokenized_once_for_the_lab_model(lab: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab / "models/lab-llama-1m")
    settings = dolly(lab, rows=400, template="chat", partition=PartitionSettings(by="shards", clients=4))
    first, second = (prepare(settings, tokenizer, tmp_path) for _ in range(2))
    assert (first.tokens_from_cache, second.tokens_from_cache) == (False, True)
    row = int(first.clients["client-0"].train[0])
    ids, labels = first.tokens.row(row)
    record = first.records[row]
    assert tokenizer.decode(ids[labels >= 0]).startswith(record.output[:100])
    assert tokenizer.decode(first.tokens.prompt(row)).endswith("<|im_start|>assistant\n")


def test_dolly_split_into_files_comes_back(lab: Path, tmp_path: Path) -> None:
    written = split_files.write(dolly(lab, rows=2_000, partition=PartitionSettings(by="shards")), tmp_path)
    back = partition_only(DataSettings(source=str(written.folder), partition=PartitionSettings(by="files")))
    assert len(back.clients) == 10
    assert len(back.records) == 2_000
