"""Per-client files: what is written gives the same clients back."""

import json
from pathlib import Path

import pytest

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data import split_files
from sheepfold.data.prepare import partition_only
from sheepfold.data.rows import PartitionedData
from sheepfold.errors import DataError

DATA = DataSettings(
    rows=240, test_share=0.1, partition=PartitionSettings(by="dirichlet", clients=12, holdout_per_category=2)
)


def texts(data: PartitionedData, client: str, part: str) -> list[tuple[str, ...]]:
    records = [data.records[row] for row in getattr(data.clients[client], part)]
    return [(r.instruction, r.input, r.output, r.category) for r in records]


@pytest.mark.parametrize("source", ["natural-instructions", "folder"])
def test_written_files_give_the_same_clients_back(tmp_path: Path, source: str) -> None:
    written = split_files.write(DATA, tmp_path)
    assert (written.folder, written.clients, written.rows) == (tmp_path / "12", 12, 240)
    before = partition_only(DATA)
    where = {"source": str(written.folder)} if source == "folder" else {"source": source, "path": str(written.folder)}
    after = partition_only(DataSettings(**where, test_share=0.1, partition=PartitionSettings(by="files")))
    assert list(after.clients) == list(before.clients)
    for name in before.clients:
        for part in ("train", "eval", "test"):
            old, new = (
                [
                    (r.instruction, r.input, r.output, r.category)
                    for r in map(d.records.__getitem__, getattr(d.clients[name], part))
                ]
                for d in (before, after)
            )
            assert old == new
    assert len(after.holdout) == len(before.holdout) == 16


def test_the_files_have_shepherds_names_and_fields(tmp_path: Path) -> None:
    folder = split_files.write(DATA, tmp_path).folder
    assert {"local_training_0.json", "local_eval_11.json", "global_test.json"} <= {p.name for p in folder.iterdir()}
    rows = json.loads((folder / "local_training_3.json").read_text(encoding="utf-8"))
    assert set(rows[0]) == {"instruction", "context", "response", "category", "client"}
    everyone = json.loads((folder / "global_training.json").read_text(encoding="utf-8"))
    assert len(everyone) == sum(len(split.train) for split in partition_only(DATA).clients.values())


def test_a_folder_with_files_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="holds files already"):
        split_files.write(DATA, tmp_path)
    assert [p.name for p in (tmp_path / "12").iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/12: cannot be written \(Not a directory\)"):
        split_files.write(DATA, tmp_path / "file")


def test_a_full_disk_leaves_no_half_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(split_files.os, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        split_files.write(DATA, tmp_path)
    assert list(tmp_path.iterdir()) == []
