"""A machine prepares its own rows, and comes to what one process comes to for a client of that name."""

import json

import numpy as np
import pytest

from sheepfold.config import DataSettings, build
from sheepfold.data.prepare import prepare
from sheepfold.errors import DataError
from sheepfold.models import load_tokenizer
from sheepfold.node.data import own_data, own_rows, own_settings
from sheepfold.tasks import task
from tests.node.nodes import ROWS, folder_of_rows, node

OPTIONS = {
    "plain": {},
    "other shares": {"eval_share": 0.3, "test_share": 0.2, "seed": 7},
    "another template": {"template": "vicuna", "max_tokens": 40, "cut": "left", "train_on_inputs": True},
}


def alone(asked: DataSettings, tmp_path, name, **over):
    """Return one machine's data, as it prepares it by itself."""
    machine = node(tmp_path, name, **over)
    own = own_settings(asked, machine)
    experiment = build({})
    return own_data(own_rows(own, name), own, machine, load_tokenizer(experiment.model), task(experiment))


def texts(data, name, split):
    """Return a client's rows of a split: their ids and what is learned of them."""
    rows = data.label_rows(name, split)
    return [tuple(t.tolist() for t in data.tokens.row(int(n))) for n in rows]


@pytest.mark.parametrize("case", OPTIONS)
def test_a_client_has_the_rows_and_splits_that_it_has_in_one_process(tmp_path, case):
    shared = folder_of_rows(tmp_path / "rows")
    asked = build({"data": {"source": str(shared), "partition": {"by": "files"}, **OPTIONS[case]}}).data
    together = prepare(asked, load_tokenizer(build({}).model), None, task(build({})))
    assert list(together.clients) == list(ROWS)
    for name in ROWS:
        found = alone(asked, tmp_path, name)
        assert list(found.clients) == [name]
        for split in ("train", "eval", "test"):
            assert texts(found, name, split) == texts(together, name, split)
        assert len(found.records) == ROWS[name], "it has no row of anybody else"
        assert len(found.holdout) == len(found.public) == 0


def test_what_is_the_servers_or_the_machines_own_is_not_taken_from_the_experiment(tmp_path):
    folder_of_rows(tmp_path / "rows")
    theirs = {"source": "dolly", "rows": 5, "test_split": "test", "public": {"source": "validation"}, "path": "/x"}
    asked = build({"data": {**theirs, "partition": {"by": "dirichlet", "column": "topic"}}}).data
    assert len(alone(asked, tmp_path, "ann").clients["ann"].train) == 22


def test_splits_that_come_with_the_rows_stay(tmp_path):
    rows = tmp_path / "mine"
    rows.mkdir()
    for split, count in {"train": 6, "test": 3, "validation": 2}.items():
        lines = [json.dumps({"question": f"{split} {i}", "reply": "yes"}) for i in range(count)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines))
    columns = {"instruction": "question", "output": "reply"}
    data = DataSettings(test_share=0.4)
    found = alone(data, tmp_path, "ann", data=str(rows), split="all", fields=columns)
    own = found.clients["ann"]
    assert [len(own.train), len(own.eval), len(own.test)] == [6, 2, 3]
    asked = data.model_copy(update={"fields": columns})
    again = alone(asked, tmp_path, "ann", data=str(rows), split="all")
    assert np.array_equal(again.tokens.ids, found.tokens.ids), "the experiment's columns, where the machine names none"
    assert again.tokens_from_cache
    assert list((tmp_path / "nodes" / "ann" / "tokens").iterdir())


def test_a_machine_without_a_row_to_train_on_says_so(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    with pytest.raises(DataError, match="ann holds no row to train on; give it more rows, or another split"):
        alone(DataSettings(), tmp_path, "ann", data=str(folder), split="all")
