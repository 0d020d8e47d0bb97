"""From settings to splits: partition first, then each client on its own, and nothing lost uncounted."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data.prepare import partition_only, prepare, split_rows
from sheepfold.errors import DataError

NONE = np.array([""] * 200)
Jsonl = Callable[..., Path]


def corpus(**values: Any) -> DataSettings:
    return DataSettings(**({"rows": 120, "partition": PartitionSettings(by="shards", clients=5)} | values))


def everything(data: Any) -> list[int]:
    return sorted(row for split in data.clients.values() for row in (*split.train, *split.eval, *split.test))


@given(count=st.integers(1, 60), eval_share=st.floats(0, 0.5), test_share=st.floats(0, 0.4), seed=st.integers(0, 9))
def test_a_split_gives_out_every_row_once_and_leaves_one_to_train_on(
    count: int, eval_share: float, test_share: float, seed: int
) -> None:
    data = DataSettings(eval_share=eval_share, test_share=test_share, seed=seed)
    rows = np.arange(100, 100 + count)
    split = split_rows("client-0", rows, NONE, data)
    assert sorted([*split.train, *split.eval, *split.test]) == rows.tolist()
    assert len(split.train) >= 1
    if count >= 20:
        assert abs(len(split.eval) - eval_share * count) <= 1


def test_a_split_depends_on_its_seed_and_client_and_nothing_else() -> None:
    rows = np.arange(100)

    def held(client: str, **values: Any) -> list[int]:
        return split_rows(client, rows, NONE, DataSettings(**values)).eval.tolist()

    assert held("a") == held("a", max_tokens=64, partition=PartitionSettings(seed=1))
    assert held("a") != held("b")
    assert held("a") != held("a", seed=1)


def test_splits_that_came_with_the_source_stay_as_they_are() -> None:
    given_splits = np.array(["train"] * 6 + ["eval"] * 2)
    split = split_rows("a", np.arange(8), given_splits, DataSettings(eval_share=0.4, test_share=0.2))
    assert split.eval.tolist() == [6, 7]
    assert len(split.test) == 2  # none came with it, so a share of the client's rows is drawn
    assert set(split.test) <= set(range(6))


def test_each_clients_evaluation_rows_have_its_own_categories() -> None:
    data = partition_only(corpus(rows=400, partition=PartitionSettings(by="meta", clients=8)))
    for split in data.clients.values():
        names = [Counter(data.records[row].category for row in rows) for rows in (split.train, split.eval)]
        assert set(names[0]) == set(names[1])


def test_preparation_holds_every_row_once(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(corpus(), tokenizer, tmp_path)
    assert everything(data) == list(range(120))
    assert len(data.tokens) == 120
    assert not data.dropped
    assert list(data.clients) == [f"client-{i}" for i in range(5)]


def test_a_second_preparation_is_the_same_and_finds_its_tokens(tokenizer: Any, tmp_path: Path) -> None:
    first, second = (prepare(corpus(), tokenizer, tmp_path) for _ in range(2))
    assert (first.tokens_from_cache, second.tokens_from_cache) == (False, True)
    assert first.fingerprint == second.fingerprint
    others = [{"seed": 1}, {"partition": PartitionSettings(clients=5)}, {"max_tokens": 300}, {"eval_share": 0.2}]
    assert len({prepare(corpus(**other), tokenizer, None).fingerprint for other in others} | {first.fingerprint}) == 5


def test_rows_without_a_target_are_in_no_split_and_counted(tokenizer: Any, jsonl: Jsonl) -> None:
    rows = [{"instruction": "word " * 60 if i % 5 == 0 else "a", "output": f"b{i}"} for i in range(40)]
    source = str(jsonl([*rows, {"instruction": "a", "output": None}]))
    settings = DataSettings(source=source, max_tokens=50, template="plain", partition=PartitionSettings(clients=2))
    data = prepare(settings, tokenizer, None)
    assert everything(data) == [i for i in range(40) if i % 5]
    assert data.dropped == {"without output": 1, "with no target left after the cut": 8}
    assert sorted(row for lost in data.without_target.values() for row in lost) == list(range(0, 40, 5))
    assert any("8 rows have no target left" in note for note in data.notes)
    learned = prepare(
        DataSettings(source=source, max_tokens=50, template="plain", train_on_inputs=True), tokenizer, None
    )
    assert everything(learned) == list(range(40))


def test_a_cut_that_leaves_no_answers_at_all_is_an_error(tokenizer: Any, jsonl: Jsonl) -> None:
    path = jsonl({"instruction": "word " * 60, "output": "b"} for _ in range(4))
    with pytest.raises(DataError, match=r"data\.max_tokens 8: no client keeps a training row.*cut: left"):
        prepare(DataSettings(source=str(path), max_tokens=8, partition=PartitionSettings(clients=2)), tokenizer, None)


def test_small_clients_keep_a_training_row_and_say_so(jsonl: Jsonl) -> None:
    path = jsonl({"instruction": "a", "output": str(i), "client": "ab"[i > 0]} for i in range(6))
    data = partition_only(DataSettings(source=str(path), partition=PartitionSettings(by="natural")))
    assert (len(data.clients["a"].train), len(data.clients["a"].eval)) == (1, 0)
    assert data.notes == ("1 clients have too few rows for eval rows: a",)


def test_clients_without_training_rows_take_no_part_and_are_named(tmp_path: Path, jsonl: Jsonl) -> None:
    jsonl([{"instruction": "a", "output": "b", "client": "w1"}], "train.jsonl")
    jsonl([{"instruction": "a", "output": "c", "client": name} for name in ("w1", "w2")], "eval.jsonl")
    data = partition_only(DataSettings(source=str(tmp_path), split="all", partition=PartitionSettings(by="natural")))
    assert list(data.clients) == ["w1"]
    assert data.dropped == {"of clients without a row to train on": 1}
    assert data.notes[-1] == "1 clients without a row to train on take no part: w2"


def test_thousands_of_natural_clients_are_quick(jsonl: Jsonl) -> None:
    import time

    path = jsonl({"instruction": "a", "output": str(i), "client": i % 3_000} for i in range(12_000))
    start = time.process_time()
    data = partition_only(DataSettings(source=str(path), partition=PartitionSettings(by="natural")))
    assert len(data.clients) == 3_000
    assert time.process_time() - start < 10  # 0.6 s here; per-client scans would take minutes
