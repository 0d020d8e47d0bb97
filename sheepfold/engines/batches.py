"""The rows of one optimizer step of all clients, cut into forward passes with little padding.

Rows of all clients are sorted by length together, so a short row never waits for another client's long one. Each row
keeps the number of its client, and each target token its client's weight, so the cut changes no result: a step's loss
is the token mean over all rows of the step, for each client.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sheepfold.data.rows import IGNORED, TokenRows


@dataclass(frozen=True, slots=True)
class Batch:
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

    def to(self, device: str | torch.device) -> "Batch":
        """Return the batch on a device."""
        names = [f.name for f in fields(self) if f.name != "useful_tokens"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


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
    pairs = [tokens.row(row.number) for row in rows]
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (row_ids, row_labels) in enumerate(pairs):
        ids[i, : len(row_ids)] = row_ids
        labels[i, : len(row_ids) - 1] = row_labels[1:]  # the hidden state at t predicts the token at t + 1
    flat = labels.view(-1)
    position = torch.nonzero(flat != IGNORED).view(-1)
    group = torch.tensor([row.group for row in rows])
    return Batch(
        ids=ids,
        group=group,
        position=position,
        target=flat[position],
        target_group=group[position // longest],
        place=torch.tensor([row.place for row in rows]),
        useful_tokens=sum(len(row_ids) for row_ids, _ in pairs),
    )
