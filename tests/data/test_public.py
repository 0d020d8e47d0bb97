"""The server's public rows: which they are, and that no client and no test set ever has one of them."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from sheepfold.cli import app
from sheepfold.config import DataSettings, PartitionSettings, PublicSettings
from sheepfold.data import doctor, files, split_files
from sheepfold.data.files import Chunk
from sheepfold.data.prepare import partition_only, prepare
from sheepfold.errors import ConfigError, DataError

Jsonl = Callable[..., Path]
TOPICS = "abc"


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"q{i}", "output": f"a{i}", "category": TOPICS[i % 3], "client": f"w{i % 4}"} | more


def settings(source: Path | str, public: dict[str, Any], **over: Any) -> DataSettings:
    asked = over.pop("partition", {"clients": 4})
    values = {"template": "plain", "test_share": 0.1, "public": PublicSettings(**public)} | over
    return DataSettings(source=str(source), partition=PartitionSettings(**asked), **values)


def corpus(**public: Any) -> DataSettings:
    return DataSettings(rows=120, public=PublicSettings(**public), partition=PartitionSettings(by="iid", clients=4))


def asked(data: Any) -> list[str]:
    """Return the instructions of the public rows."""
    return [data.records[i].instruction for i in data.public]


def held(data: Any) -> list[int]:
    """Return the rows of clients and test set."""
    rows = [i for split in data.clients.values() for i in (*split.train, *split.eval, *split.test)]
    return sorted([*rows, *data.holdout])


def apart(data: Any) -> None:
    """Check that every row is somebody's, and nobody else's."""
    everything = sorted([*held(data), *data.public])
    assert everything == list(range(len(data.records)))
    assert data.public.tolist() == sorted(data.public)


def test_the_first_share_is_the_source_s_first_rows(jsonl: Jsonl) -> None:
    data = partition_only(settings(jsonl(row(i) for i in range(60)), {"share": 0.2}))
    assert data.public.tolist() == list(range(12))
    apart(data)


def test_clients_whose_rows_are_all_public_are_named(jsonl: Jsonl) -> None:
    path = jsonl(row(i) | {"client": f"w{i // 10}"} for i in range(40))
    data = partition_only(settings(path, {"share": 0.5}, partition={"by": "natural"}))
    assert list(data.clients) == ["w2", "w3"]
    assert any(note == "2 clients have no row beside the public ones: w0, w1" for note in data.notes)


def test_a_random_share_is_drawn_by_the_partition_s_seed(jsonl: Jsonl) -> None:
    path = jsonl(row(i) for i in range(60))

    def drawn(**over: Any) -> list[int]:
        data = partition_only(settings(path, {"share": 0.2, "pick": "random"}, **over))
        apart(data)
        return data.public.tolist()

    assert drawn() == drawn(seed=1) == drawn(partition={"by": "natural"})
    assert drawn() != drawn(partition={"clients": 4, "seed": 1})
    assert drawn() != list(range(12))
    assert len(drawn()) == 12


@given(
    rows=st.integers(5, 80),
    share=st.floats(0.001, 0.7),
    pick=st.sampled_from(["first", "random"]),
    by=st.sampled_from(["iid", "order", "quantity"]),
)
def test_any_share_is_at_least_a_row_and_the_rest_is_the_clients(rows: int, share: float, pick: str, by: str) -> None:
    partition = PartitionSettings(by=by, clients=1, min_rows=1)
    data = partition_only(
        DataSettings(rows=rows, public=PublicSettings(share=share, pick=pick), partition=partition)  # type: ignore[arg-type]
    )
    apart(data)
    assert len(data.public) == max(1, round(share * rows))


EVERY = [
    {"by": "iid", "clients": 4},
    {"by": "order", "clients": 4},
    {"by": "shards", "clients": 4},
    {"by": "dirichlet", "clients": 4, "min_rows": 2},
    {"by": "quantity", "clients": 4, "min_rows": 2},
    {"by": "meta", "clients": 3},
    {"by": "natural"},
]


@pytest.mark.parametrize("holdout", [0, 2])
@pytest.mark.parametrize("pick", ["first", "random"])
@pytest.mark.parametrize("partition", EVERY, ids=lambda p: p["by"])
def test_no_partitioner_hands_out_a_public_row(
    jsonl: Jsonl, partition: dict[str, Any], pick: str, holdout: int
) -> None:
    path = jsonl(row(i) for i in range(90))
    data = partition_only(
        settings(path, {"share": 0.3, "pick": pick}, partition={**partition, "holdout_per_category": holdout})
    )
    apart(data)
    assert (len(data.public), len(data.holdout)) == (27, 3 * holdout)


def test_clients_get_what_they_would_get_of_the_rest_alone(jsonl: Jsonl) -> None:
    """A share in front changes nothing but which rows are there."""
    with_public = partition_only(settings(jsonl(row(i) for i in range(60)), {"share": 0.25}))
    alone = partition_only(settings(jsonl((row(i) for i in range(15, 60)), "rest.jsonl"), {}))
    for name, split in alone.clients.items():
        for part in ("train", "eval", "test"):
            mine, theirs = (
                [d.records[i].instruction for i in getattr(d.clients[name], part)] for d in (with_public, alone)
            )
            assert mine == theirs
            assert split


def test_the_share_is_of_rows_to_train_on_and_per_client_files_stay_clients(tmp_path: Path, jsonl: Jsonl) -> None:
    for client in range(3):
        jsonl((row(100 * client + i, client="") for i in range(10)), f"local_training_{client}.jsonl")
        jsonl((row(100 * client + 50 + i, client="") for i in range(2)), f"local_eval_{client}.jsonl")
    jsonl((row(900 + i) for i in range(4)), "global_test.jsonl")
    data = partition_only(settings(tmp_path, {"share": 0.2, "pick": "random"}, partition={"by": "files"}))
    apart(data)
    assert len(data.public) == 6
    assert all(int(name[1:]) % 100 < 50 for name in asked(data)), "evaluation rows stay what they are"
    assert list(data.clients) == ["0", "1", "2"]
    assert len(data.holdout) == 4


@pytest.mark.parametrize("by", ["iid", "natural", "order"])
def test_another_split_or_a_file_can_be_the_source(tmp_path: Path, jsonl: Jsonl, by: str) -> None:
    jsonl((row(i) for i in range(40)), "folder/train.jsonl")
    jsonl((row(200 + i) for i in range(8)), "folder/validation.jsonl")
    jsonl((row(300 + i) for i in range(6)), "folder/test.jsonl")
    other = jsonl(({"instruction": f"q{400 + i}", "output": "a"} for i in range(5)), "ours.jsonl")
    folder, partition = tmp_path / "folder", {"by": by, "clients": 4}
    split = partition_only(settings(folder, {"source": "validation"}, test_split="test", partition=partition))
    assert asked(split) == [f"q{200 + i}" for i in range(8)]
    file = partition_only(settings(folder, {"source": str(other)}, test_split="test", partition=partition))
    assert asked(file) == [f"q{400 + i}" for i in range(5)]
    for data in (split, file):
        apart(data)
        assert [data.records[i].instruction for i in data.holdout] == [f"q{300 + i}" for i in range(6)]
        assert list(data.clients) == ([f"w{i}" for i in range(4)] if by == "natural" else list(data.clients))


def test_a_partition_file_names_them_by_their_numbers_in_the_source(tmp_path: Path, jsonl: Jsonl) -> None:
    path = jsonl([*(row(i) for i in range(5)), {"instruction": "no answer"}, *(row(i) for i in range(6, 20))])
    file = tmp_path / "parts.json"
    lists = {"x": [0, 1, 2, 3], "y": list(range(6, 12)), "test": [12, 13], "public": [4, 5, 14, 19]}
    file.write_text(json.dumps(lists))
    data = partition_only(settings(path, {}, partition={"by": str(file)}))
    assert asked(data) == ["q4", "q14", "q19"]
    assert list(data.clients) == ["x", "y"]
    assert data.dropped == {"without output": 1, "in no client's part": 4}
    other = jsonl([row(77)], "more.jsonl")
    both = partition_only(settings(path, {"source": str(other)}, partition={"by": str(file)}))
    assert asked(both) == ["q4", "q14", "q19", "q77"]


def test_a_partition_file_cannot_make_a_test_row_public(tmp_path: Path, jsonl: Jsonl) -> None:
    jsonl((row(i) for i in range(8)), "folder/train.jsonl")
    jsonl((row(100 + i) for i in range(4)), "folder/test.jsonl")
    file = tmp_path / "parts.json"
    file.write_text(json.dumps({"x": [0, 1, 2], "y": [3, 4], "public": [5, 9]}))
    with pytest.raises(DataError, match=r"parts.json: row 9 is one of the public rows and of the test set"):
        partition_only(settings(tmp_path / "folder", {}, test_split="test", partition={"by": str(file)}))
    file.write_text(json.dumps({"x": [0, 1, 2], "public": [2, 3]}))
    with pytest.raises(DataError, match=r"row 2 is given out 2 times \(x, public\)"):
        partition_only(settings(tmp_path / "folder", {}, partition={"by": str(file)}))


def test_a_limit_counts_the_rows_to_train_on_before_the_share_is_taken(tmp_path: Path, jsonl: Jsonl) -> None:
    path = jsonl(row(i) for i in range(60))
    data = partition_only(settings(path, {"share": 0.5}, rows=20))
    assert (len(data.records), len(data.public)) == (20, 10)
    other = jsonl((row(100 + i, client="elsewhere") for i in range(9)), "ours.jsonl")
    data = partition_only(settings(path, {"source": str(other)}, rows=20))
    assert (len(data.records), len(data.public)) == (29, 9)
    apart(data)


def test_a_subsample_thins_public_rows_by_category_too(jsonl: Jsonl) -> None:
    path, other = jsonl(row(i) for i in range(60)), jsonl((row(100 + i) for i in range(30)), "ours.jsonl")
    data = partition_only(settings(path, {"source": str(other)}, subsample=0.4))
    assert (len(data.records), len(data.public)) == (36, 12)
    assert {data.records[i].category for i in data.public} == set(TOPICS)
    apart(data)


def test_the_fingerprint_knows_the_public_rows(tokenizer: Any) -> None:
    made = [
        prepare(corpus(**public), tokenizer, None)
        for public in ({}, {"share": 0.2}, {"share": 0.25}, {"share": 0.2, "pick": "random"}, {"share": 0.2})
    ]
    prints = [data.fingerprint for data in made]
    assert len(set(prints)) == 4
    assert prints[1] == prints[4]
    assert [len(data.public) for data in made] == [0, 24, 30, 24, 24]
    assert not set(made[1].public) & set(held(made[1]))


def test_the_fingerprint_knows_them_where_clients_are_the_same(tokenizer: Any, tmp_path: Path, jsonl: Jsonl) -> None:
    path, file, prints = jsonl(row(i) for i in range(20)), tmp_path / "parts.json", set()
    for public in ([], [16], [17], [16, 17]):
        file.write_text(json.dumps({"x": list(range(8)), "y": list(range(8, 16)), "public": public}))
        prints.add(prepare(settings(path, {}, partition={"by": str(file)}), tokenizer, None).fingerprint)
    assert len(prints) == 4


def test_public_rows_without_a_target_are_left_out(tokenizer: Any, jsonl: Jsonl) -> None:
    rows = [row(i, instruction="word " * 60 if i % 2 else f"q{i}") for i in range(20)]
    data = prepare(settings(jsonl(rows), {"share": 0.5}, max_tokens=40, partition={"clients": 2}), tokenizer, None)
    assert data.public.tolist() == [0, 2, 4, 6, 8]


def test_a_written_split_has_them_in_a_file_that_gives_them_back(tmp_path: Path) -> None:
    written = split_files.write(corpus(share=0.2), tmp_path)
    file = written.folder / "public.json"
    before = partition_only(corpus(share=0.2))
    assert [r["instruction"] for r in json.loads(file.read_text())] == asked(before)
    assert all("client" not in r for r in json.loads(file.read_text()))
    assert written.rows == 120
    after = partition_only(settings(written.folder, {"source": str(file)}, partition={"by": "files"}, test_share=0.0))
    assert asked(after) == asked(before)
    apart(after)
    without = partition_only(settings(written.folder, {}, partition={"by": "files"}, test_share=0.0))
    assert len(without.records) == 120 - 24, "the file by itself is nobody's"
    assert not (split_files.write(corpus(), tmp_path / "other").folder / "public.json").exists()


def test_the_doctor_counts_them_and_those_that_are_evaluation_rows_too(tokenizer: Any, jsonl: Jsonl) -> None:
    rows = [row(i) for i in range(30)]
    other = jsonl([row(500), *(row(i, output=f" a{i} ") for i in range(30)), row(501)], "ours.jsonl")
    data = prepare(settings(jsonl(rows), {"source": str(other)}, eval_share=0.2), tokenizer, None)
    report = doctor.examine(data, tokenizer)
    judged = sum(len(split.eval) + len(split.test) for split in data.clients.values())
    assert (report.public_rows, report.leaked_public_rows) == (32, judged)
    assert report.as_dict()["public_rows"] == 32
    assert report.as_dict()["leaked_public_rows"] == judged
    text = StringIO()
    Console(file=text, width=120).print(doctor.render(report))
    assert f"32 public rows are the server's, and no client's; {judged} of them are evaluation rows" in text.getvalue()
    none = doctor.examine(prepare(settings(jsonl(rows), {}), tokenizer, None), tokenizer)
    text = StringIO()
    Console(file=text, width=120).print(doctor.render(none))
    assert none.public_rows == 0
    assert "public" not in text.getvalue()


def test_data_show_says_how_many_there_are() -> None:
    words = ["data", "show", "data.rows=80", "data.partition.by=iid", "data.partition.holdout_per_category=0"]
    shown = CliRunner().invoke(app, [*words, "data.public.share=0.25"])
    assert shown.exit_code == 0, shown.output
    assert "20 public rows are the server's, and no client's" in shown.output
    assert "public" not in CliRunner().invoke(app, words).output


@pytest.mark.parametrize(
    ("public", "over", "why"),
    [
        ({"source": "nowhere.json"}, {}, "nowhere.json: no such file"),
        ({"source": "train"}, {}, r"data.public.source 'train': clients hold this split \(data.split\)"),
        ({"source": "test"}, {"test_split": "test"}, r"'test': is the test set too \(data.test_split\)"),
        ({"source": "validation"}, {"split": "all"}, "clients hold this split"),
        ({"source": "folder/train.jsonl"}, {}, r"train.jsonl': clients hold its rows \(data.source\)"),
        ({"source": "folder/test.jsonl"}, {"test_split": "test"}, r"is the test set too \(data.test_split\)"),
        ({"source": "empty.jsonl"}, {}, "data.public: source .*empty.jsonl' gives no usable row"),
        ({"share": 0.2}, {"partition": {"by": "x.json"}}, "list the rows in .*x.json under 'public'"),
        ({"share": 0.99}, {}, "fewer than 4 clients"),
    ],
)
def test_rows_that_cannot_be_public_are_refused_in_one_line(
    tmp_path: Path, jsonl: Jsonl, public: dict[str, Any], over: dict[str, Any], why: str
) -> None:
    jsonl((row(i) for i in range(40)), "folder/train.jsonl")
    jsonl((row(100 + i) for i in range(4)), "folder/test.jsonl")
    jsonl((row(200 + i) for i in range(4)), "folder/validation.jsonl")
    jsonl([{"instruction": "unanswered"}], "empty.jsonl")
    if str(public.get("source", "")).endswith("l"):
        public = {"source": str(tmp_path / public["source"])}
    with pytest.raises((ConfigError, DataError), match=why) as error:
        partition_only(settings(tmp_path / "folder", public, **over))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "split", "test_split", "public", "why"),
    [
        ("a/b", "train", None, "train[:20%]", r"'train\[:20%\]': clients hold this split"),
        ("a/b", "train[20%:]", None, "train", "clients hold this split"),
        ("a/b", "train+test", None, "test", "clients hold this split"),
        ("a/b", "train", None, "all", "clients hold this split"),
        ("a/b", "train", "validation", "validation[:5]", "is the test set too"),
        ("natural-instructions", "train", None, "validation", "clients hold this split"),
        ("a/b", "train[20%:]", "validation", "train[:20%]", None),
    ],
)
def test_a_hub_split_and_its_slices_are_not_both_handed_out(
    monkeypatch: pytest.MonkeyPatch, source: str, split: str, test_split: str | None, public: str, why: str | None
) -> None:
    """Hub rows carry no file that would tell them apart, so their splits' names must."""
    read = iter([[row(first + i) for i in range(9)] for first in (0, 30, 60)])
    monkeypatch.setattr(files, "read_hub", lambda name, split: [Chunk(next(read), name, name)])
    asked = settings(source, {"source": public}, split=split, test_split=test_split)
    if why is None:
        apart(partition_only(asked))
    else:
        with pytest.raises(ConfigError, match=why):
            partition_only(asked)


@pytest.mark.parametrize(
    ("public", "why"),
    [
        ({"share": 0.2, "source": "validation"}, r"share 0.2 and source 'validation' .* keep one of them \(share=0"),
        ({"pick": "random"}, "pick 'random' has no effect without share"),
        ({"source": "validation", "pick": "random"}, "pick 'random' has no effect without share"),
        ({"share": 1.0}, "share"),
        ({"share": -0.1}, "share"),
        ({"pick": "last", "share": 0.1}, "pick"),
    ],
)
def test_settings_that_contradict_each_other_say_so(public: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PublicSettings(**public)


def test_the_built_in_corpus_has_no_other_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.public.source has no effect with data.source 'corpus'"):
        partition_only(DataSettings(public=PublicSettings(source="validation")))


def test_nobody_asked_for_any() -> None:
    data = partition_only(DataSettings(rows=40, partition=PartitionSettings(clients=2)))
    assert data.public.dtype == np.int64
    assert len(data.public) == 0
    assert not PublicSettings().wanted
