"""The rows of one optimizer step of all clients, cut into forward passes with little padding.

Rows of all clients are sorted by length together, so a short row never waits for another client's long one. Each row
keeps the number of its client, and each target token its client's weight, so the cut changes no result: a step's loss
is the token mean over all rows of the step, for each client. On a GPU rows are packed instead (packing.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sheepfold.data.rows import IGNORED, TokenRows


@dataclass(frozen=True, slots=True)
class Tensors:
    """Values whose tensors go to a device together."""

    def to(self, device: str | torch.device) -> Self:
        """Return it on a device; from pinned memory the copy runs beside whatever the device does."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """Return it in memory from which a GPU copies by itself."""
        return self._each(lambda t: t.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: change(v) for n, v in values.items() if isinstance(v, Tensor)}
        moved |= {n: v._each(change) for n, v in values.items() if isinstance(v, Tensors)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Pack(Tensors):
    """How rows lie end to end in (1, tokens); see packing.py."""

    starts: Tensor
    """(rows + 1,) int32: where each row begins, and the end"""
    positions: Tensor
    """(1, tokens) int64: each token's place in its row"""
    row: Tensor
    """(tokens,) int64: each token's row"""
    longest: int
    tokens_of: list[int]
    """Tokens of each client, by number, as far as the last that has some"""


@dataclass(frozen=True, slots=True)
class Batch(Tensors):
    """Rows that go through the base together, right-padded; causal attention needs no mask for padding on the right."""

    ids: Tensor
    """(rows, tokens) int64"""
    group: Tensor
    """(rows,) int64: the client, or another thing that losses are counted by"""
    position: Tensor
    """(targets,) int64: where in the flattened (rows * tokens) hidden states each target is predicted from"""
    target: Tensor
    """(targets,) int64: the token to predict"""
    target_group: Tensor
    """(targets,) int64: the group of each target"""
    place: Tensor
    """(rows,) int64: each row's place in its group's step"""
    useful_tokens: int

    pack: Pack | None = None
    """Where rows lie end to end, how"""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the data, and for whom it is processed."""

    number: int
    group: int
    place: int = 0


Collate = Callable[[TokenRows, Sequence[Row]], Batch]


def batches(
    tokens: TokenRows, rows: Sequence[Row], *, max_rows: int, max_tokens: int, collate: Collate | None = None
) -> Iterator[Batch]:
    """Yield the rows in passes of at most max_rows rows and max_tokens tokens with padding, shortest rows first.

    collate: how rows become one batch; None: each hidden state predicts the next token.

    A row longer than max_tokens gets a pass of its own. Ties keep the order given, so the cut is deterministic.
    """
    made = collate or next_tokens
    ordered = sorted(rows, key=lambda row: tokens.length(row.number))
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and end - start < max_rows:
            if tokens.length(ordered[end].number) * (end + 1 - start) > max_tokens:
                break
            end += 1
        yield made(tokens, ordered[start:end])
        start = end


def next_tokens(tokens: TokenRows, rows: Sequence[Row]) -> Batch:
    """Return the rows as one right-padded batch whose targets are the next tokens."""
    joined = tokens.joined([row.number for row in rows])
    ids, _, lengths = joined
    longest = int(lengths.max())
    padded = np.zeros((len(rows), longest), dtype=np.int64)
    padded[np.arange(longest) < lengths[:, None]] = ids
    before = np.arange(len(rows)) * longest - (np.cumsum(lengths) - lengths)
    return batch_of(rows, padded, joined, np.arange(len(ids)) + np.repeat(before, lengths))


def batch_of(
    rows: Sequence[Row],
    ids: np.ndarray,
    joined: tuple[np.ndarray, np.ndarray, np.ndarray],
    place: np.ndarray,
    pack: Pack | None = None,
) -> Batch:
    """Return the batch of rows that lie as `ids` has them, and whose targets are the next tokens.

    joined: the rows' ids, labels and lengths end to end; place: where in the flattened `ids` each of those tokens is.
    """
    _, labels, lengths = joined
    follows = np.append(labels[1:], IGNORED)  # the hidden state at t predicts the token at t + 1
    follows[np.cumsum(lengths) - 1] = IGNORED  # of this row
    learned = np.flatnonzero(follows != IGNORED)
    group = np.array([row.group for row in rows], dtype=np.int64)
    return Batch(
        ids=torch.from_numpy(ids),
        group=torch.from_numpy(group),
        position=torch.from_numpy(place[learned]),
        target=torch.from_numpy(follows[learned]),
        target_group=torch.from_numpy(np.repeat(group, lengths)[learned]),
        place=torch.tensor([row.place for row in rows]),
        useful_tokens=len(labels),
        pack=pack,
    )
