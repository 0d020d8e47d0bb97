"""From settings to what a run trains on: source, partition, split inside each client, tokens.

Partition first, then split: a client is judged on rows of its own distribution.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sheepfold.config import DataSettings, PublicSettings
from sheepfold.data import sources
from sheepfold.data.assign import Partition, assign
from sheepfold.data.partition import natural_key
from sheepfold.data.rows import ClientRows, FederatedData, PartitionedData, TokenRows
from sheepfold.errors import DataError
from sheepfold.rng import stream

if TYPE_CHECKING:
    from sheepfold.tasks.base import Task

SPLITS = ("train", "eval", "test")


def prepare(data: DataSettings, tokenizer: Any, cache: Path | None, task: "Task | None" = None) -> FederatedData:
    """Return everything that a run trains and evaluates on, its tokens memory-mapped from `cache` (None: in memory).

    task: None for causal_lm; one with labels takes them from the data. A row with nothing left to learn after the cut
    is in no split; FederatedData counts it.
    Raises ConfigError and DataError, one line each.
    """
    return as_tokens(partition_only(data), data, tokenizer, cache, task)


def as_tokens(
    parted: PartitionedData, data: DataSettings, tokenizer: Any, cache: Path | None, task: "Task | None" = None
) -> FederatedData:
    """Return the second half of `prepare`: rows that are parted and split, with their tokens."""
    from sheepfold.tasks import with_labels

    task = with_labels(task, data, parted.records)
    tokenized = task.tokenize(parted.records, tokenizer, data, cache)
    learnable = tokenized.rows.target_tokens() > 0
    clients, without = _with_targets(parted.clients, learnable)
    if not clients:
        raise DataError(
            f"data.max_tokens {data.max_tokens}: no client keeps a training row with an answer in it; raise "
            "max_tokens, or set cut: left to shorten prompts"
        )
    return FederatedData(
        records=parted.records,
        clients=clients,
        tokens=tokenized.rows,
        holdout=parted.holdout[learnable[parted.holdout]],
        public=parted.public[learnable[parted.public]],
        fingerprint=_fingerprint(tokenized.fingerprint, clients, parted.holdout, parted.public),
        dropped=dict(parted.dropped) | _count("with no target left after the cut", int((~learnable).sum())),
        without_target=without,
        notes=parted.notes + _cut_notes(tokenized.rows, learnable, data) + _gone(parted.clients, clients),
        tokens_from_cache=tokenized.from_cache,
        labels=task.labels,
    )


def partition_only(data: DataSettings) -> PartitionedData:
    """Return who holds which rows and how each client's rows are split, without a tokenizer."""
    source = sources.read(data)
    partition = assign(source, data.partition, data.public)
    clients = {name: split_rows(name, rows, source.splits, data) for name, rows in partition.clients.items()}
    if data.public.wanted and not len(partition.public):
        raise DataError(
            f"data.public: {_asked(data.public)} gives no usable row; name other rows, or leave data.public out"
        )
    held = {name: split for name, split in clients.items() if len(split.train)}
    if not held:
        raise DataError(f"data.partition.by {data.partition.by!r}: no client holds a row to train on")
    reasons = dict(source.dropped) | _count("in no client's part", partition.left_out)
    stranded = sum(map(_size, clients.values())) - sum(map(_size, held.values()))
    reasons |= _count("of clients without a row to train on", stranded)
    notes = tuple(f"{count:,} rows left out: {reason}" for reason, count in reasons.items())
    notes += _all_public(source, partition, data) + _small(held, data) + _gone(clients, held)
    return PartitionedData(source.records, held, partition.holdout, reasons, notes, partition.public)


def _asked(public: PublicSettings) -> str:
    return f"share {public.share}" if public.source is None else f"source {public.source!r}"


def split_rows(client: str, rows: np.ndarray, given: np.ndarray, data: DataSettings) -> ClientRows:
    """Return one client's rows as train, eval and test, each ascending.

    given: (records,) str, the splits that came with the source; these stay as they are, and a share is drawn only for a
    split that the client has no rows of. At least one row is left to train on.
    """
    parts = {name: rows[given[rows] == name] for name in SPLITS}
    pool = np.concatenate([parts["train"], rows[given[rows] == ""]])
    pool = stream(data.seed, "split", client).permutation(pool) if len(pool) else pool
    for name, share in (("test", data.test_share), ("eval", data.eval_share)):
        if len(parts[name]) == 0 and share > 0:
            size = min(max(1, round(share * len(rows))), max(len(pool) - 1, 0))
            parts[name], pool = pool[:size], pool[size:]
    return ClientRows(np.sort(pool), np.sort(parts["eval"]), np.sort(parts["test"]))


def _size(split: ClientRows) -> int:
    return len(split.train) + len(split.eval) + len(split.test)


def _with_targets(
    clients: Mapping[str, ClientRows], learnable: np.ndarray
) -> tuple[dict[str, ClientRows], dict[str, np.ndarray]]:
    """Return the clients with rows that can be learned from, and for every client the rows that cannot."""
    kept, without = {}, {}
    for name, split in clients.items():
        clean = ClientRows(*(rows[learnable[rows]] for rows in (split.train, split.eval, split.test)))
        everything = np.concatenate([split.train, split.eval, split.test])
        without[name] = np.sort(everything[~learnable[everything]])
        if len(clean.train):
            kept[name] = clean
    return kept, without


def _count(reason: str, rows: int) -> dict[str, int]:
    return {reason: rows} if rows else {}


def _small(clients: Mapping[str, ClientRows], data: DataSettings) -> tuple[str, ...]:
    wanted = [name for name, share in (("eval", data.eval_share), ("test", data.test_share)) if share > 0]
    notes = []
    for split in wanted:
        names = [name for name, rows in clients.items() if not len(getattr(rows, split))]
        if names:
            notes.append(f"{len(names)} clients have too few rows for {split} rows: {_listed(names)}")
    return tuple(notes)


def _all_public(source: sources.Source, partition: Partition, data: DataSettings) -> tuple[str, ...]:
    """Return the note on clients of the data's own that have nothing left, since the server took all their rows."""
    if data.partition.by not in ("natural", "files"):
        return ()
    owners = {source.records[row].client or str(source.names[row]) for row in partition.public}
    names = sorted(owners - partition.clients.keys(), key=natural_key)
    return (f"{len(names)} clients have no row beside the public ones: {_listed(names)}",) if names else ()


def _gone(before: Mapping[str, ClientRows], after: Mapping[str, ClientRows]) -> tuple[str, ...]:
    names = [name for name in before if name not in after]
    return (f"{len(names)} clients without a row to train on take no part: {_listed(names)}",) if names else ()


def _cut_notes(tokens: TokenRows, learnable: np.ndarray, data: DataSettings) -> tuple[str, ...]:
    cut, lost = int(tokens.cut.sum()), int((~learnable).sum())
    over = f"{cut:,} of {len(tokens):,} rows were longer than max_tokens {data.max_tokens} and cut on the {data.cut}"
    gone = f"{lost:,} rows have no target left after the cut and are in no split"
    return ((over,) if cut else ()) + ((gone,) if lost else ())


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fingerprint(tokens: str, clients: Mapping[str, ClientRows], holdout: np.ndarray, public: np.ndarray) -> str:
    digest = hashlib.blake2b(tokens.encode(), digest_size=16)
    for name, split in clients.items():
        digest.update(repr((name, *map(len, (split.train, split.eval, split.test)))).encode())
        for rows in (split.train, split.eval, split.test):
            digest.update(rows.astype(np.int64).tobytes())
    digest.update(holdout.astype(np.int64).tobytes())
    if len(public):
        digest.update(b"public" + public.astype(np.int64).tobytes())
    return digest.hexdigest()
