"""Labels or ids in, client parts out: the draws, as pure functions of labels and a named stream.

Each row goes to exactly one part. Which settings lead to which draw is in assign.py.

    iid        a shuffle, cut into equal parts
    in_order   cut into equal parts as the rows come
    shards     rows sorted by label, cut into clients x shards_per_client shards, random shards a client
    dirichlet  each label's rows shared out by p ~ Dirichlet(alpha, ..., alpha)
    quantity   a shuffle, cut into sizes n * p, p ~ Dirichlet(alpha, ..., alpha)
    meta       a label a client; surplus labels dealt round-robin
    grouped    a part for each name: the client column, or the file
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from sheepfold.errors import DataError
from sheepfold.rng import stream

REDRAWS = 1_000
"""Draws of sizes after which a minimum counts as out of reach."""

Rng = np.random.Generator


def iid(rows: int, clients: int, rng: Rng) -> list[np.ndarray]:
    """Return equal random parts; sizes differ by at most one."""
    return np.array_split(rng.permutation(rows), clients)


def in_order(rows: int, clients: int) -> list[np.ndarray]:
    """Return equal parts of consecutive rows; sizes differ by at most one."""
    return np.array_split(np.arange(rows), clients)


def shards(labels: np.ndarray, clients: int, per_client: int, rng: Rng) -> list[np.ndarray]:
    """Return random shards of the rows sorted by label: few labels a client, equal sizes.

    Source: arXiv:1602.05629, section 3; Shepherd's client_data_allocation with diff_quantity 0.
    """
    pieces = np.array_split(np.argsort(labels, kind="stable"), clients * per_client)
    order = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.concatenate([pieces[piece] for piece in row]) for row in order]


def dirichlet(labels: np.ndarray, clients: int, alpha: float, min_rows: int, seed: int) -> list[np.ndarray]:
    """Return label-skewed parts of unequal size, each with at least min_rows.

    Each label draws p ~ Dirichlet(alpha); a client that already holds n / clients rows or more gets p = 0 of the
    labels still to come. Source: arXiv:1909.06335 and, for the limit, Shepherd's diff_quantity 1. FS-LLM's lda is
    the same draw without the limit, so a client can hold far more rows there. Both redraw for the smallest client.
    """

    def draw(rng: Rng) -> list[np.ndarray] | None:
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        held = np.zeros(clients, dtype=np.int64)
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            share = rng.dirichlet(np.full(clients, alpha)) * (held < len(labels) / clients)
            if not share.sum() > 0:  # a small alpha gives everything to clients that are full
                return None
            pieces = np.split(rows, _cuts(share, len(rows)))
            for part, piece in zip(parts, pieces, strict=True):
                part.append(piece)
            held += [len(piece) for piece in pieces]
        return [np.concatenate(part) for part in parts]

    return _redrawn(draw, len(labels), clients, alpha, min_rows, seed, "dirichlet")


def quantity(rows: int, clients: int, alpha: float, min_rows: int, seed: int) -> list[np.ndarray]:
    """Return random parts whose sizes are rows * p, p ~ Dirichlet(alpha), each at least min_rows.

    Source: arXiv:2102.02079, section 4.3 (quantity skew).
    """

    def draw(rng: Rng) -> list[np.ndarray]:
        return np.split(rng.permutation(rows), _cuts(rng.dirichlet(np.full(clients, alpha)), rows))

    return _redrawn(draw, rows, clients, alpha, min_rows, seed, "quantity")


def meta(labels: np.ndarray, clients: int, rng: Rng) -> list[np.ndarray]:
    """Return whole labels: shuffled, then dealt round-robin. Source: FS-LLM's meta splitter.

    Raises DataError where there are fewer labels than clients.
    """
    found = np.unique(labels)
    if len(found) < clients:
        raise DataError(
            f"data.partition: meta gives each client a category of its own, and {clients} clients are more than the "
            f"{len(found)} categories; set data.partition.clients to {len(found)} or fewer, or by: dirichlet"
        )
    dealt = rng.permutation(found)
    return [np.flatnonzero(np.isin(labels, dealt[client::clients])) for client in range(clients)]


def grouped(names: np.ndarray) -> dict[str, np.ndarray]:
    """Return {name: its rows}, names in their natural order, in one sort for any number of names."""
    found, inverse = np.unique(names, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    pieces = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    parts = dict(zip(map(str, found), pieces, strict=True))
    return {name: parts[name] for name in sorted(parts, key=natural_key)}


def numbered(parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the parts by client name, client-0 on, padded so that names sort as numbers do."""
    width = len(str(len(parts) - 1))
    return {f"client-{i:0{width}d}": part for i, part in enumerate(parts)}


def _cuts(share: np.ndarray, rows: int) -> np.ndarray:
    return (np.cumsum(share / share.sum())[:-1] * rows).astype(np.int64)


def _redrawn(
    draw: Callable[[Rng], list[np.ndarray] | None],
    rows: int,
    clients: int,
    alpha: float,
    min_rows: int,
    seed: int,
    by: str,
) -> list[np.ndarray]:
    """Return the first draw that gives every client min_rows; raise DataError where none of REDRAWS does."""
    advice = "lower min_rows, take fewer clients, or raise alpha"
    if clients * min_rows > rows:
        raise DataError(
            f"data.partition: {clients} clients with min_rows {min_rows} need {clients * min_rows:,} rows, "
            f"and there are {rows:,}; lower min_rows or take fewer clients"
        )
    best = 0
    for attempt in range(REDRAWS):
        parts = draw(stream(seed, "partition", by, attempt))
        smallest = min(map(len, parts)) if parts else 0
        if parts and smallest >= min_rows:
            return parts
        best = max(best, smallest)
    raise DataError(
        f"data.partition: none of {REDRAWS:,} draws of {by} with alpha {alpha} gave each of {clients} clients min_rows "
        f"{min_rows} (the best smallest client had {best}); {advice}"
    )


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key under which client-2 comes before client-10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
