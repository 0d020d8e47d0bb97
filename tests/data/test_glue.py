"""GLUE by name: original files, folders in its layout, rows as the hub has them."""

import json

import pytest

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data.glue import GLUE
from sheepfold.data.prepare import partition_only
from sheepfold.data.sources import read
from sheepfold.errors import ConfigError, DataError

COLA = 'gj04\t1\t\tThey ran.\ngj04\t0\t*\tThey drank the pub.\ngj04\t1\t\t"Open quotes.\n'


def test_cola_is_read_from_its_original_files_without_a_header(tmp_path):
    path = tmp_path / "in_domain_train.tsv"
    path.write_text(COLA)
    records = read(DataSettings(source="cola", path=str(path))).records
    assert [(r.instruction, r.input, r.output) for r in records] == [
        ("They ran.", "", "acceptable"),
        ("They drank the pub.", "", "unacceptable"),
        ('"Open quotes.', "", "acceptable"),
    ]
    assert records[1].category == "unacceptable"


@pytest.mark.parametrize("names", [("train", "dev"), ("in_domain_train", "in_domain_dev")])
def test_a_folder_gives_its_dev_split_as_the_global_test_set(tmp_path, names):
    (tmp_path / f"{names[0]}.tsv").write_text(COLA * 4)
    (tmp_path / f"{names[1]}.tsv").write_text(COLA)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tHe went.\n")
    order = PartitionSettings(by="order", clients=2)
    data = DataSettings(source="cola", path=str(tmp_path), test_split="validation", partition=order, eval_share=0)
    parted = partition_only(data)
    assert [rows.train.tolist() for rows in parted.clients.values()] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [parted.records[i].instruction for i in parted.holdout] == [
        "They ran.",
        "They drank the pub.",
        '"Open quotes.',
    ]


def test_a_file_of_its_own_can_be_the_test_set(tmp_path):
    for name, count in (("train", 6), ("held", 2)):
        (tmp_path / f"{name}.csv").write_text("instruction,output\n" + "".join(f"s{i},yes\n" for i in range(count)))
    data = DataSettings(source=str(tmp_path / "train.csv"), partition=PartitionSettings(clients=2))
    assert len(partition_only(data.model_copy(update={"test_split": str(tmp_path / "held.csv")})).holdout) == 2
    with pytest.raises(ConfigError, match=r"data.test_split 'train': clients hold this split"):
        read(data.model_copy(update={"test_split": "train"}))
    with pytest.raises(DataError, match=r"one file has only the split 'train', found data.test_split 'validation'"):
        read(data.model_copy(update={"test_split": "validation"}))


HEADERS = {
    "sst2": ("sentence\tlabel", "fine . \t1"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tfine . \tgood ."),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tfine . \tgood .\t1"),
    "mnli": ("index\tsentence1\tsentence2\tlabel1\tgold_label", "0\tfine . \tgood .\tneutral\tneutral"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tfine . \tgood .\tnot_entailment"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tfine . \tgood .\tnot_entailment"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tfine . \tgood .\t1"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_every_task_is_read_from_glues_own_tables(name, tmp_path):
    (tmp_path / "train.tsv").write_text("\n".join(HEADERS[name]) + "\n")
    [record] = read(DataSettings(source=name, path=str(tmp_path))).records
    assert (record.instruction, record.input) == ("fine . ", "good ." if GLUE[name].second else "")
    assert record.output == GLUE[name].labels[1]


@pytest.mark.parametrize("name", GLUE)
def test_every_task_is_read_from_rows_as_the_hub_has_them(name, tmp_path):
    task = GLUE[name]
    row = dict.fromkeys((task.first[0], *task.second[:1]), "Good.") | {"idx": 3}
    rows = [row | {"label": label} for label in (*range(len(task.labels)), -1)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = read(DataSettings(source=name, path=str(tmp_path)))
    assert tuple(record.output for record in source.records) == task.labels
    assert source.dropped == {"without a label": 1}


def test_mnlis_two_dev_sets_are_two(tmp_path):
    header = "sentence1\tsentence2\tgold_label\n"
    for name, count in (("train", 4), ("dev_matched", 1), ("dev_mismatched", 2)):
        (tmp_path / f"{name}.tsv").write_text(header + "a\tb\tneutral\n" * count + "c\td\t-\n")
    for split, rows in (("validation_matched", 1), ("dev_mismatched", 2), ("validation", 3)):
        data = DataSettings(source="mnli", path=str(tmp_path), test_split=split)
        assert (read(data).splits == "holdout").sum() == rows


def test_a_regression_task_and_an_unknown_label_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.source 'stsb': STS-B asks for a number"):
        read(DataSettings(source="stsb"))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t1\nwell\t7\n")
    with pytest.raises(DataError, match=r"train.tsv, row 1: the label is '7'; expected 0 \(negative\), 1 \(positive\)"):
        read(DataSettings(source="sst2", path=str(tmp_path)))


@pytest.mark.lab
@pytest.mark.parametrize(("name", "train", "dev", "ones"), [("cola", 8_551, 527, 6_388), ("sst2", 67_349, 436, 37_797)])
def test_the_published_files_give_every_row(name, train, dev, ones, lab):
    source = read(DataSettings(source=name, path=str(lab / "data" / name), test_split="validation"))
    assert (source.splits == "holdout").sum() == dev
    assert (source.splits == "").sum() == train
    assert sum(record.output == GLUE[name].labels[1] for record in source.records) == ones
