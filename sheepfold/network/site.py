"""The server's own part of a run between machines: who takes part, the rows that no client holds, and what cannot be.

What makes clients out of one pile of rows (data.partition, data.rows) is for one machine, and is left aside here: each
client has its rows already. What would take the server's rows out of that pile is refused, since nobody has the pile.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sheepfold.assembly import Site, check
from sheepfold.config import DataSettings, Experiment, PartitionSettings
from sheepfold.data import sources, token_cache
from sheepfold.data.partition import natural_key
from sheepfold.data.rows import FederatedData, TokenRows
from sheepfold.errors import ConfigError, DataError, suggest
from sheepfold.strategies.base import Strategy, parts_of

if TYPE_CHECKING:
    from sheepfold.tasks.base import Task

MAY_BE_LATE = ("fedavg", "fedit", "fedprox", "ffa_lora")
"""Methods that are means of factors, the same ones in each round, and remember nothing."""


def site(experiment: Experiment, enrolled: Sequence[str]) -> Site:
    """Return the server's site. Raises ConfigError and DataError for what cannot be between machines, one line each."""
    check_devices(experiment)
    made, _ = check(experiment)
    check_network(experiment, made)
    everybody = names(experiment, enrolled)
    return Site(everybody, lambda tokenizer, task: server_rows(experiment, tokenizer, task), serves=True)


def names(experiment: Experiment, enrolled: Sequence[str]) -> list[str]:
    """Return who takes part, in the order of their names. Raises ConfigError for names that are not enrolled."""
    wanted = experiment.network.clients
    if not enrolled:
        raise ConfigError("network: no client is enrolled; `sheepfold enroll PUBKEY --name ward-7` enrolls one")
    if wanted and (unknown := [name for name in wanted if name not in enrolled]):
        raise ConfigError(f"network.clients: {unknown[0]!r} is not enrolled; {suggest(unknown[0], enrolled)}")
    return sorted(wanted or enrolled, key=natural_key)


def check_devices(experiment: Experiment) -> None:
    """Raise ConfigError for devices that the experiment names: each machine's are its owner's to say."""
    if experiment.train.batch_devices:
        raise ConfigError(
            "train.batch_devices: between machines each client trains on its own `device`, as its node file says; "
            "remove it"
        )
    if (sharding := experiment.train.sharding) != "none":
        raise ConfigError(f"train.sharding {sharding}: between machines each client trains in one process; remove it")


def check_network(experiment: Experiment, made: Strategy) -> None:
    """Raise ConfigError for the first thing that an experiment asks for and that machines apart cannot do."""
    data, settings = experiment.data, experiment.network
    if data.public.share:
        raise ConfigError(
            f"data.public.share {data.public.share:g}: between machines no one has all rows to take a share of; name "
            "the server's own rows as data.public.source, a file or a split"
        )
    if held := data.partition.holdout_per_category:
        raise ConfigError(
            f"data.partition.holdout_per_category {held}: between machines no one has all rows to hold some out of; "
            "name the server's own rows as data.test_split, a file or a split"
        )
    if aside := _set_aside(data.partition):
        raise ConfigError(
            f"data.partition.by {data.partition.by}: its {aside!r} rows would be the server's, and between machines "
            "each client has rows of its own; name the server's as data.test_split and data.public.source"
        )
    if experiment.offsite is not None:
        raise ConfigError("offsite: an emulator has no way to another machine yet; run it in one process")
    if settings.late == "next" and (problem := _cannot_be_late(experiment, made)):
        raise ConfigError(f"network.late next: {problem}; set it to drop")


def labelled(experiment: Experiment) -> Experiment:
    """Return the experiment with its labels in it, where rows have labels: every machine must number them alike.

    Raises DataError where neither the experiment nor rows of the server's say which labels there are.
    """
    from sheepfold.tasks.classification import labels_of

    if experiment.task != "classification" or experiment.data.labels:
        return experiment
    named = sources.NAMED.get(experiment.data.source)
    source = None if named and named.labels else sources.read_others(_of_server(experiment.data))
    if source is None and not (named and named.labels):
        raise DataError(
            "data.labels: between machines the labels must be told beforehand, since no one sees all rows; set it, "
            "such as [negative, positive]"
        )
    labels = labels_of(experiment.data, source.records if source else ())
    return experiment.model_copy(update={"data": experiment.data.model_copy(update={"labels": labels})})


def server_rows(experiment: Experiment, tokenizer: Any, task: "Task") -> FederatedData:
    """Return the rows that no client holds, the test set's and the public ones, with their tokens; it has no clients.

    Raises ConfigError and DataError, one line each.
    """
    from sheepfold.tasks import with_labels

    data = labelled(experiment).data
    source = sources.read_others(_of_server(data))
    if source is None:
        return FederatedData([], {}, _no_tokens(data), fingerprint="none", labels=with_labels(task, data, []).labels)
    task = with_labels(task, data, source.records)
    tokenized = task.tokenize(source.records, tokenizer, data, token_cache.folder(experiment.cache))
    learnable = tokenized.rows.target_tokens() > 0
    holdout, public = (np.flatnonzero((source.splits == use) & learnable) for use in ("holdout", "public"))
    if data.public.wanted and not len(public):
        raise DataError(f"data.public.source {data.public.source!r}: gives no usable row; name other rows")
    lost = {"with no target left after the cut": int((~learnable).sum())} if not learnable.all() else {}
    dropped = dict(source.dropped) | lost
    return FederatedData(
        records=source.records,
        clients={},
        tokens=tokenized.rows,
        holdout=holdout,
        public=public,
        fingerprint=f"{tokenized.fingerprint}-{len(holdout)}-{len(public)}",
        dropped=dropped,
        notes=tuple(f"{count:,} rows left out: {reason}" for reason, count in dropped.items()),
        tokens_from_cache=tokenized.from_cache,
        labels=task.labels,
    )


def _of_server(data: DataSettings) -> DataSettings:
    """Return the data settings without what is about clients."""
    return data.model_copy(update={"partition": PartitionSettings()})


def _no_tokens(data: DataSettings) -> TokenRows:
    none = np.array([], dtype=np.int32)
    targets = np.array([], dtype=bool)
    return TokenRows(none, targets, np.zeros(1, dtype=np.int64), none, targets, data.train_on_inputs)


def _set_aside(partition: PartitionSettings) -> str | None:
    """Return the name of the server's rows in a partition file, where it is here and lists some."""
    path = Path(partition.by).expanduser()
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # nothing of it is used here
    return next((name for name in ("test", "public") if isinstance(lists, dict) and lists.get(name)), None)


def _cannot_be_late(experiment: Experiment, made: Strategy) -> str | None:
    """Return why an update cannot count in a round after its own; None where it can."""
    if odd := [name for name in parts_of(made) if name not in MAY_BE_LATE]:
        return f"federation.strategy {odd[0]} is no mean of factors without memory ({', '.join(MAY_BE_LATE)} are)"
    if experiment.personal.keep_local or experiment.personal.ditto:
        kept = "keep_local" if experiment.personal.keep_local else "ditto"
        return f"with personal.{kept} clients go on from what they kept in the rounds that counted"
    if experiment.federation.wire.up == "int8":
        return "with federation.wire.up int8 what an update lost is counted from its own round's start"
    return None
