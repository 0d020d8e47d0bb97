"""Partition settings in, {client: row numbers} out: which draw, from which labels, and what is held out before.

Every draw comes from a stream named by `partition.seed` alone. Rows keep their order inside a client.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold import plugins
from sheepfold.config import PartitionSettings, PublicSettings
from sheepfold.data import partition
from sheepfold.data.partition import grouped, natural_key, numbered
from sheepfold.data.sources import Source
from sheepfold.errors import ConfigError, DataError
from sheepfold.rng import stream


@dataclass(frozen=True, slots=True)
class Partition:
    """Which record belongs to whom; row numbers index the source's records."""

    clients: Mapping[str, np.ndarray]
    """Each client's rows, ascending, in client order."""
    holdout: np.ndarray
    """Rows of the global test set."""
    left_out: int = 0
    """Rows that a partition file or an own partitioner gave to nobody."""
    public: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))
    """Rows that the server has."""


def assign(source: Source, settings: PartitionSettings, public: PublicSettings = PublicSettings()) -> Partition:
    """Return the partition that the settings name; the public rows are taken before any client is given some.

    Raises ConfigError for a partitioner that does not exist, DataError for rows it cannot part.
    """
    free = np.flatnonzero(~np.isin(source.splits, ("holdout", "public")))
    given = np.flatnonzero(source.splits == "holdout")
    ours = np.flatnonzero(source.splits == "public")
    if settings.by.endswith(".json"):
        if public.share:
            raise ConfigError(
                f"data.public.share {public.share} with a partition file: list the rows in {settings.by} under 'public'"
            )
        return _from_file(source, Path(settings.by).expanduser(), given, ours)
    if public.share:
        ours = _share(source, free, settings, public)
        free = np.setdiff1d(free, ours, assume_unique=True)
    held = _holdout(source, free, settings)
    rest = np.setdiff1d(free, held, assume_unique=True)
    part = plugins.find(PARTITIONERS, settings.by, "data.partition.by")
    if settings.by in PARTITIONERS:
        clients = part(_Rows(source, rest), settings)
    else:
        clients = part([source.records[row] for row in rest], settings)
    clients = _checked(clients, len(rest), f"data.partition.by {settings.by!r}")
    kept = {name: np.sort(rest[rows]) for name, rows in clients.items()}
    assigned = sum(map(len, kept.values()))
    return Partition(kept, np.sort(np.concatenate([given, held])), len(rest) - assigned, ours)


def _share(source: Source, rows: np.ndarray, settings: PartitionSettings, public: PublicSettings) -> np.ndarray:
    """Return the server's share of the rows that are to be trained on, at least one of them."""
    pool = rows[np.isin(source.splits[rows], ("", "train"))]  # what the source holds out stays where it is
    size = max(1, round(public.share * len(pool)))
    if public.pick == "random":
        pool = stream(settings.seed, "partition", "public").permutation(pool)
    return np.sort(pool[:size])


@dataclass(frozen=True, slots=True)
class _Rows:
    source: Source
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self, settings: PartitionSettings, way_on: str) -> np.ndarray:
        """Return every row's label; raises DataError where a row has none."""
        client = settings.by == "natural" or (settings.column == "client")
        name = "client" if client else "category"
        found = np.array([getattr(self.source.records[row], name) for row in self.rows])
        if (blank := np.flatnonzero(found == "")).size:
            column = settings.column if settings.column not in ("category", "client") else name
            raise DataError(
                f"data.partition.by {settings.by!r} looks at the {name} (column {column!r}), and {blank.size:,} of "
                f"{len(self):,} rows have none, row {self.source.numbers[self.rows[blank[0]]]} first (from 0); "
                f"fill it in or leave those rows out, set data.fields.{name} to the column that has it, or {way_on}"
            )
        return found


def _enough(rows: int, parts: int, what: str) -> None:
    if rows < parts:
        raise DataError(
            f"data.partition: {rows:,} rows are fewer than {parts:,} {what}; take fewer clients or more rows"
        )


def _iid(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    _enough(len(rows), settings.clients, "clients")
    return numbered(partition.iid(len(rows), settings.clients, stream(settings.seed, "partition", "iid")))


def _order(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    _enough(len(rows), settings.clients, "clients")
    return numbered(partition.in_order(len(rows), settings.clients))


def _shards(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    _enough(len(rows), settings.clients * settings.shards_per_client, "shards (clients x shards_per_client)")
    labels, rng = rows.labels(settings, "by: iid"), stream(settings.seed, "partition", "shards")
    return numbered(partition.shards(labels, settings.clients, settings.shards_per_client, rng))


def _dirichlet(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    labels = rows.labels(settings, "by: quantity")
    return numbered(partition.dirichlet(labels, settings.clients, settings.alpha, settings.min_rows, settings.seed))


def _quantity(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    return numbered(partition.quantity(len(rows), settings.clients, settings.alpha, settings.min_rows, settings.seed))


def _meta(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    return numbered(
        partition.meta(rows.labels(settings, "by: iid"), settings.clients, stream(settings.seed, "partition", "meta"))
    )


def _natural(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    return grouped(rows.labels(settings, "by: iid"))


def _files(rows: _Rows, settings: PartitionSettings) -> dict[str, np.ndarray]:
    source = rows.source
    names = np.array([source.records[row].client or str(source.names[row]) for row in rows.rows])
    if len(set(names)) < 2:
        raise DataError(
            f"data.partition.by 'files' makes each file a client, and all {len(rows):,} rows are one file "
            f"({names[0]!r}); name a folder of per-client files, or by: iid"
        )
    return grouped(names)


PARTITIONERS: dict[str, Callable[[_Rows, PartitionSettings], dict[str, np.ndarray]]] = {
    "iid": _iid,
    "order": _order,
    "shards": _shards,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
    "meta": _meta,
    "natural": _natural,
    "files": _files,
}


def _holdout(source: Source, rows: np.ndarray, settings: PartitionSettings) -> np.ndarray:
    """Return the rows that are held out of every client: some of each category, drawn before any partition."""
    count = settings.holdout_per_category
    if count == 0:
        return np.array([], dtype=np.int64)
    rows = rows[np.isin(source.splits[rows], ("", "train"))]  # what the source holds out stays where it is
    held = []
    for category, members in grouped(np.array([source.records[row].category for row in rows])).items():
        if len(members) <= count:
            raise DataError(
                f"data.partition.holdout_per_category {count} leaves no row of category {category!r}, which has "
                f"{len(members)}; hold out fewer, or leave the category out of the data"
            )
        held.append(stream(settings.seed, "partition", "holdout", category).choice(rows[members], count, replace=False))
    return np.sort(np.concatenate(held))


def _from_file(source: Source, path: Path, given: np.ndarray, ours: np.ndarray) -> Partition:
    """Return a partition from a JSON file {client: [row numbers], "test": [held-out ones], "public": [the server's]}.

    The numbers count the rows of the source as it was read, so rows that were left out are passed over.
    """
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"data.partition.by: no such partition file {path}") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable partition file ({error}); expected {{client: [row numbers]}}"
        ) from None
    if not isinstance(lists, dict) or not lists:
        raise DataError(f"{path}: expected an object {{client: [row numbers]}}, found a {type(lists).__name__}")
    parts = _checked(lists, None, str(path))
    last = max((int(rows.max()) for rows in parts.values() if len(rows)), default=0)
    position = np.full(max(int(source.numbers[-1]), last) + 1, -1, dtype=np.int64)
    position[source.numbers] = np.arange(len(source.numbers))
    found = {name: np.sort(position[rows][position[rows] >= 0]) for name, rows in parts.items()}
    if not sum(map(len, found.values())):
        raise DataError(f"{path}: none of its row numbers is a row of the source; was it made for other data?")
    holdout = np.union1d(found.pop("test", np.array([], dtype=np.int64)), given)
    ours = np.union1d(found.pop("public", np.array([], dtype=np.int64)), ours)
    if (both := np.intersect1d(holdout, ours)).size:
        raise DataError(
            f"{path}: row {source.numbers[both[0]]} is one of the public rows and of the test set; keep it in one"
        )
    taken = np.union1d(given, ours)
    found = {name: np.setdiff1d(found[name], taken) for name in sorted(found, key=natural_key)}
    left_out = len(source.records) - sum(map(len, found.values())) - len(holdout) - len(ours)
    return Partition(found, holdout, left_out, ours)


def _checked(parts: Any, rows: int | None, where: str) -> dict[str, np.ndarray]:
    """Return parts as int64 arrays; raises DataError where a row is no row number, or is given twice."""
    if not isinstance(parts, Mapping) or not parts:
        raise DataError(
            f"{where}: returned a {type(parts).__name__}; expected {{client: row numbers}} with at least one client"
        )
    clean: dict[str, np.ndarray] = {}
    for name, part in parts.items():
        array = np.asarray(part if len(part) else np.array([], dtype=np.int64))
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"{where}: client {name!r} holds {array.dtype} of shape {array.shape}; expected a list of row numbers"
            )
        clean[str(name)] = array.astype(np.int64)
    everything = np.concatenate(list(clean.values()))
    if everything.size and (everything.min() < 0 or (rows is not None and everything.max() >= rows)):
        raise DataError(
            f"{where}: row numbers run from {everything.min()} to {everything.max()}; expected 0 to {(rows or 0) - 1}"
        )
    values, counts = np.unique(everything, return_counts=True)
    if (counts > 1).any():
        twice = int(values[counts > 1][0])
        holders = [name for name, part in clean.items() if twice in part]
        raise DataError(
            f"{where}: row {twice} is given out {counts.max()} times ({', '.join(holders)}); "
            "clients must not share rows"
        )
    return clean
