"""Every partitioner: disjoint, complete, and the same for the same seed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.config import PartitionSettings
from sheepfold.data import partition
from sheepfold.data.assign import assign
from sheepfold.data.rows import Record
from sheepfold.data.sources import Source
from sheepfold.errors import ConfigError, DataError


def source(labels: list[str], clients: list[str] | None = None, splits: list[str] | None = None) -> Source:
    clients = clients or [""] * len(labels)
    records = [
        Record("ask", str(i), category=c, client=k) for i, (c, k) in enumerate(zip(labels, clients, strict=True))
    ]
    number = np.arange(len(records))
    return Source(records, number, np.array(splits or [""] * len(records)), np.array(["rows"] * len(records)), {})


def seeded(**values: Any) -> PartitionSettings:
    return PartitionSettings(**values)


@st.composite
def labels(draw: st.DrawFn) -> list[str]:
    """30 to 120 rows of 4 to 6 labels, each label there at least once, in any order."""
    names = [f"label-{i}" for i in range(draw(st.integers(4, 6)))]
    more = draw(st.lists(st.sampled_from(names), min_size=30, max_size=110))
    return names + more


MADE = ["iid", "shards", "dirichlet", "quantity", "meta"]


@pytest.mark.parametrize("by", MADE)
@given(labels=labels(), clients=st.integers(2, 4), seed=st.integers(0, 5), held=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_every_row_has_exactly_one_holder(by: str, labels: list[str], clients: int, seed: int, held: int) -> None:
    rows = source(labels * 2)
    part = assign(rows, seeded(by=by, clients=clients, seed=seed, alpha=1.0, holdout_per_category=held))
    everything = np.concatenate([*part.clients.values(), part.holdout])
    assert sorted(everything) == list(range(len(labels) * 2))
    assert len(part.clients) == clients
    assert all((np.diff(held_rows) > 0).all() for held_rows in part.clients.values())


@pytest.mark.parametrize("by", MADE)
def test_a_seed_names_one_partition_and_another_seed_another(by: str) -> None:
    rows = source([f"label-{i % 5}" for i in range(200)])
    first, again, other = (assign(rows, seeded(by=by, clients=4, seed=seed)).clients for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert any(first[name].tolist() != other[name].tolist() for name in first)


def test_iid_parts_differ_by_at_most_one_row() -> None:
    sizes = {len(part) for part in assign(source(["a"] * 103), seeded(clients=10)).clients.values()}
    assert sizes == {10, 11}


def test_shards_give_a_client_few_labels() -> None:
    rows = source([f"label-{i % 10}" for i in range(1_000)])
    part = assign(rows, seeded(by="shards", clients=10)).clients
    assert all(len({rows.records[row].category for row in held}) <= 3 for held in part.values())
    assert {len(held) for held in part.values()} == {100}


def test_dirichlet_keeps_its_minimum_and_gives_no_more_to_a_full_client() -> None:
    found = np.array([f"label-{i % 8}" for i in range(4_000)])
    parts = partition.dirichlet(found, 10, 0.5, 40, seed=42)
    assert min(map(len, parts)) >= 40
    # A client takes its last label while below n / clients, so it ends with at most that plus one whole label.
    assert max(map(len, parts)) < 4_000 / 10 + 500


def test_a_small_alpha_is_more_skewed_than_a_large_one() -> None:
    found = np.array([f"label-{i % 5}" for i in range(2_000)])

    def share_of_the_largest_label(alpha: float) -> float:
        parts = partition.dirichlet(found, 5, alpha, 1, seed=0)
        return float(np.mean([np.unique(found[part], return_counts=True)[1].max() / len(part) for part in parts]))

    assert share_of_the_largest_label(0.1) > share_of_the_largest_label(100.0) + 0.2


def test_quantity_sizes_are_skewed_and_labels_are_not() -> None:
    found = np.array([f"label-{i % 2}" for i in range(4_000)])
    parts = partition.quantity(4_000, 5, 0.5, 100, seed=1)
    assert max(map(len, parts)) > 3 * min(map(len, parts))
    assert all(abs((found[part] == "label-0").mean() - 0.5) < 0.15 for part in parts)


def test_meta_gives_whole_categories_and_deals_the_surplus() -> None:
    rows = source([f"label-{i % 10}" for i in range(100)])
    part = assign(rows, seeded(by="meta", clients=9)).clients
    held = [{rows.records[row].category for row in members} for members in part.values()]
    assert sorted(map(len, held)) == [1] * 8 + [2]
    assert set().union(*held) == {f"label-{i}" for i in range(10)}


def test_natural_clients_keep_their_names_and_numbers_sort_as_numbers() -> None:
    names = ["ward-10", "ward-2", "ward-2", "ward-1"]
    part = assign(source([""] * 4, names), seeded(by="natural")).clients
    assert list(part) == ["ward-1", "ward-2", "ward-10"]
    assert part["ward-2"].tolist() == [1, 2]


def test_made_names_sort_as_their_numbers_do() -> None:
    names = list(partition.numbered([np.array([i]) for i in range(101)]))
    assert names == sorted(names)
    assert names[7] == "client-007"


def test_the_holdout_takes_the_same_number_of_every_category() -> None:
    rows = source([f"label-{i % 4}" for i in range(100)])
    part = assign(rows, seeded(clients=3, holdout_per_category=10))
    held = [rows.records[row].category for row in part.holdout]
    assert {held.count(f"label-{i}") for i in range(4)} == {10}


def test_rows_that_come_as_evaluation_rows_are_never_the_holdout() -> None:
    rows = source(["a"] * 20, splits=["train"] * 15 + ["eval"] * 5)
    assert assign(rows, seeded(clients=2, holdout_per_category=3)).holdout.max() < 15


def test_a_partition_file_gives_out_its_lists_and_holds_out_its_test_list(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({"10": [0, 3], "2": [1], "test": [4]}))
    part = assign(source(["a"] * 6), seeded(by=str(path)))
    assert {name: rows.tolist() for name, rows in part.clients.items()} == {"2": [1], "10": [0, 3]}
    assert part.holdout.tolist() == [4]
    assert part.left_out == 2


def test_a_partition_file_counts_the_rows_as_they_were_read(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({"0": [0, 2], "1": [1, 3]}))
    whole = source(["a"] * 3)
    without_row_1 = Source(whole.records, np.array([0, 2, 3]), whole.splits, whole.names, {})
    part = assign(without_row_1, seeded(by=str(path)))
    assert {name: rows.tolist() for name, rows in part.clients.items()} == {"0": [0, 1], "1": [2]}


def own(records: list[Record], partition_settings: PartitionSettings) -> dict[str, list[int]]:
    return {"even": list(range(0, len(records), 2)), "odd": list(range(1, len(records), 2))}


def greedy(records: list[Record], partition_settings: PartitionSettings) -> dict[str, list[int]]:
    return {"one": [0, 1], "two": [1, 2]}


def test_an_own_partitioner_is_used_by_name() -> None:
    part = assign(source(["a"] * 5), seeded(by="tests.data.test_partition:own"))
    assert {name: rows.tolist() for name, rows in part.clients.items()} == {"even": [0, 2, 4], "odd": [1, 3]}


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (source(["a"] * 3), {"clients": 5}, ["3 rows", "5 clients"]),
        (source(["a"] * 9), {"by": "shards", "clients": 5}, ["9 rows", "10 shards"]),
        (
            source(["a", "", "b", "b"]),
            {"by": "shards", "clients": 1},
            ["1 of 4 rows", "row 1 first", "data.fields.category"],
        ),
        (source(["a"] * 4), {"by": "natural"}, ["4 of 4 rows", "data.fields.client"]),
        (source(["a", "b"] * 9), {"by": "meta", "clients": 3}, ["3 clients", "2 categories", "dirichlet"]),
        (source(["a"] * 50), {"by": "dirichlet", "clients": 6, "min_rows": 10}, ["need 60 rows", "50"]),
        (
            source(["a", "b"] * 20),
            {"by": "dirichlet", "clients": 8, "min_rows": 5, "alpha": 0.01},
            ["1,000 draws", "alpha"],
        ),
        (source(["a"] * 9), {"by": "files"}, ["one file", "folder"]),
        (source(["a"] * 9), {"holdout_per_category": 9}, ["leaves no row", "'a'"]),
        (source(["a"] * 9), {"by": "tests.data.test_partition:greedy"}, ["row 1", "2 times", "one, two"]),
    ],
)
def test_a_partition_that_cannot_be_says_why_and_what_next(
    rows: Source, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        assign(rows, seeded(**settings))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"0": [0, 99999]}', None),
        ('{"0": ["a"]}', ["'0'", "list of row numbers"]),
        ('{"0": [0, 1], "1": [1]}', ["row 1", "0, 1"]),
        ("[1, 2]", ["found a list"]),
        ("{", ["not a readable partition file"]),
        ('{"0": [70]}', ["none of its row numbers"]),
    ],
)
def test_a_broken_partition_file_is_named(tmp_path: Path, text: str, words: list[str] | None) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    if words is None:
        assert assign(source(["a"] * 3), seeded(by=str(path))).clients["0"].tolist() == [0]
        return
    with pytest.raises(DataError) as error:
        assign(source(["a"] * 3), seeded(by=str(path)))
    assert all(word in str(error.value) for word in [*words, str(path)]), str(error.value)


def test_an_unknown_partitioner_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'dirichlet'"):
        assign(source(["a"] * 3), seeded(by="dirichelt"))
