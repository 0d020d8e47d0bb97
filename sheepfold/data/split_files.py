"""A partition as a folder of per-client files, in Shepherd's and FlexLoRA's layout.

    <folder>/<clients>/local_training_<i>.json   a JSON array; local_eval_<i>.json, local_test_<i>.json beside it
    <folder>/<clients>/global_training.json      all clients' training rows
    <folder>/<clients>/global_test.json          the rows that no client holds

`data.source` <folder>/<clients> with `data.partition.by: files` gives the same clients back.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.config import DataSettings
from sheepfold.data.prepare import partition_only
from sheepfold.data.rows import PartitionedData, Record
from sheepfold.errors import DataError

PARTS = {"train": "training", "eval": "eval", "test": "test"}


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, and where."""

    folder: Path
    clients: int
    rows: int
    files: int


def write(data: DataSettings, folder: Path) -> Written:
    """Write the partition that the settings describe, all of it or nothing; what is there already is left alone.

    Raises DataError where the folder holds files already or cannot be written.
    """
    parted = partition_only(data)
    target = folder / str(len(parted.clients))
    if target.exists() and any(target.iterdir()):
        raise DataError(f"{target}: holds files already, which are left as they are; name another folder or remove it")
    files = _files(parted)
    half = folder / f".{target.name}.{os.getpid()}"
    try:
        half.mkdir(parents=True)
        for name, rows in files.items():
            (half / name).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(half, target)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        raise DataError(f"{target}: cannot be written ({error.strerror or error}); name a folder with space") from None
    written = sum(len(rows) for name, rows in files.items() if name != "global_training.json")
    return Written(target, len(parted.clients), written, len(files))


def _files(parted: PartitionedData) -> dict[str, list[dict[str, Any]]]:
    files: dict[str, list[dict[str, Any]]] = {}
    everything: list[dict[str, Any]] = []
    for number, (client, split) in enumerate(parted.clients.items()):
        for part, word in PARTS.items():
            rows = [_row(parted.records[row], client) for row in getattr(split, part)]
            if part == "train" or rows:  # an empty file would say no more than no file does
                files[f"local_{word}_{number}.json"] = rows
        everything += files[f"local_training_{number}.json"]
    files["global_training.json"] = everything
    if len(parted.holdout):
        files["global_test.json"] = [_row(parted.records[row], "") for row in parted.holdout]
    if len(parted.public):
        files["public.json"] = [_row(parted.records[row], "") for row in parted.public]
    return files


def _row(record: Record, client: str) -> dict[str, Any]:
    """Return a record under Shepherd's field names; the others are ours, and Shepherd passes over them."""
    row: dict[str, Any] = {"instruction": record.instruction, "context": record.input, "response": record.output}
    row |= {name: text for name, text in (("category", record.category), ("client", client)) if text}
    if record.messages:
        row["messages"] = [{"role": message.role, "content": message.content} for message in record.messages]
    return row
