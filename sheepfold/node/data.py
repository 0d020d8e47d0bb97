"""A client machine's own rows, prepared as the experiment says, from where the machine has them.

Whose rows these are, and what is held out of whom, needs no partition here: all of them are one client's. They are
split by the same draws as in one process, so a client of the same name and rows has the same training rows there.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from sheepfold.config import DataSettings, PartitionSettings, PublicSettings
from sheepfold.data import sources
from sheepfold.data.prepare import as_tokens, split_rows
from sheepfold.data.rows import FederatedData, PartitionedData
from sheepfold.errors import DataError
from sheepfold.node.settings import NodeSettings

if TYPE_CHECKING:
    from sheepfold.tasks.base import Task


def own_settings(asked: DataSettings, node: NodeSettings) -> DataSettings:
    """Return the experiment's data settings as they hold on this machine.

    Shared: template, system, max_tokens, cut, shares, seed, labels, subsample (of these rows). The machine's own:
    source, path, split, fields where it names any. The server's: public and test rows, and `rows`, which counts its
    own.
    """
    return asked.model_copy(
        update={
            "source": node.data,
            "path": node.path,
            "split": node.split,
            "fields": asked.fields if node.fields is None else node.fields,
            "rows": None,
            "test_split": None,
            "partition": PartitionSettings(),
        }
    )


def own_rows(data: DataSettings, name: str) -> PartitionedData:
    """Return all rows of a source as this client's, split; no tokenizer has looked at them.

    data: see `own_settings`. Raises ConfigError and DataError, one line each.
    """
    source = sources.read(data.model_copy(update={"public": PublicSettings()}))  # those rows are the server's
    split = split_rows(name, np.arange(len(source.records)), source.splits, data)
    if not len(split.train):
        raise DataError(f"data: {name} holds no row to train on; give it more rows, or another split")
    notes = tuple(f"{count:,} rows left out: {reason}" for reason, count in source.dropped.items())
    wanted = {"eval": (data.eval_share, split.eval), "test": (data.test_share, split.test)}
    notes += tuple(
        f"too few rows for {which} rows" for which, (share, rows) in wanted.items() if share and not len(rows)
    )
    return PartitionedData(source.records, {name: split}, np.array([], dtype=np.int64), source.dropped, notes)


def own_data(
    parted: PartitionedData, data: DataSettings, node: NodeSettings, tokenizer: Any, task: "Task"
) -> FederatedData:
    """Return this client's rows with their tokens, which are kept in the machine's own folder."""
    return as_tokens(parted, data, tokenizer, node.cache, task)
