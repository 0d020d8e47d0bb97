"""What is wrong with the data before it is trained on, client by client.

Rows that were cut, rows with nothing left to learn, rows that occur twice, and training rows that are also evaluation
rows: each is counted, so that no run has to be explained by them afterwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sheepfold.data.rows import FederatedData, Record

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

Example = tuple[tuple[str, bool], ...]
"""Pieces of one decoded row: (text, whether it is learned)"""


@dataclass(frozen=True, slots=True)
class ClientReport:
    """One client's numbers; rows count all its splits."""

    client: str
    train_rows: int
    eval_rows: int
    test_rows: int
    tokens: int
    target_tokens: int
    cut_rows: int
    """Longer than max_tokens"""
    rows_without_target: int
    """Nothing left to learn after the cut; in no split"""
    repeated_rows: int
    """Rows that this client already has, word for word"""
    shared_rows: int
    """Rows that another client has too"""
    leaked_rows: int
    """Training rows that are also evaluation, test or held-out rows, of this client or any other"""

    @property
    def trouble(self) -> int:
        """How many rows something is wrong with, for ranking."""
        return self.cut_rows + self.rows_without_target + self.repeated_rows + self.shared_rows + self.leaked_rows


@dataclass(frozen=True, slots=True)
class Report:
    """The whole examination."""

    clients: tuple[ClientReport, ...]
    holdout_rows: int
    public_rows: int
    """Rows that the server has"""
    leaked_public_rows: int
    """Those of them that are also evaluation, test or held-out rows of anybody"""
    dropped: dict[str, int]
    notes: tuple[str, ...]
    example: Example

    def total(self) -> ClientReport:
        """Return all clients added up."""
        sums = {name: sum(getattr(c, name) for c in self.clients) for name in _NUMBERS}
        return ClientReport("all", **sums)

    def worst(self, most: int) -> tuple[ClientReport, ...]:
        """Return the clients with the most rows that something is wrong with, in client order."""
        ranked = sorted(range(len(self.clients)), key=lambda i: (-self.clients[i].trouble, i))[:most]
        return tuple(self.clients[i] for i in sorted(ranked))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "total": asdict(self.total()),
            "clients": [asdict(client) for client in self.clients],
            "holdout_rows": self.holdout_rows,
            "public_rows": self.public_rows,
            "leaked_public_rows": self.leaked_public_rows,
            "dropped": dict(self.dropped),
            "notes": list(self.notes),
            "example": [{"text": text, "learned": learned} for text, learned in self.example],
        }


_NUMBERS = tuple(name for name in ClientReport.__slots__ if name != "client")


def examine(data: FederatedData, tokenizer: Any) -> Report:
    """Return what there is to know about every client's rows."""
    keys = _keys(data.records)
    lengths, targets, cut = data.tokens.lengths(), data.tokens.target_tokens(), data.tokens.cut
    everything = {name: _all_rows(data, name) for name in data.clients}
    lost = {name: data.without_target.get(name, np.array([], dtype=np.int64)) for name in data.clients}
    holders = np.zeros(int(keys.max(initial=0)) + 1, dtype=np.int64)
    for rows in everything.values():
        holders[np.unique(keys[rows])] += 1
    judged = [np.concatenate([split.eval, split.test]) for split in data.clients.values()]
    evaluated = np.zeros(len(holders), dtype=bool)
    evaluated[keys[np.concatenate([*judged, data.holdout]).astype(np.int64)]] = True
    reports = [
        ClientReport(
            client=name,
            train_rows=len(data.clients[name].train),
            eval_rows=len(data.clients[name].eval),
            test_rows=len(data.clients[name].test),
            tokens=int(lengths[rows].sum()),
            target_tokens=int(targets[rows].sum()),
            cut_rows=int(cut[rows].sum() + cut[lost[name]].sum()),
            rows_without_target=len(lost[name]),
            repeated_rows=len(rows) - len(np.unique(keys[rows])),
            shared_rows=int((holders[keys[rows]] > 1).sum()),
            leaked_rows=int(evaluated[keys[data.clients[name].train]].sum()),
        )
        for name, rows in everything.items()
    ]
    leaked = int(evaluated[keys[data.public]].sum())
    return Report(
        clients=tuple(reports),
        holdout_rows=len(data.holdout),
        public_rows=len(data.public),
        leaked_public_rows=leaked,
        dropped=dict(data.dropped),
        notes=data.notes,
        example=_example(data, tokenizer),
    )


def render(report: Report, most: int = 20) -> "Group":
    """Return the report for a terminal; beyond `most` clients, the worst ones and the totals."""
    from rich.console import Group
    from rich.text import Text

    notes = [Text(f"• {note}") for note in (*report.notes, *_public(report))]
    head = Text("\nOne training row; what the loss passes over is dim:", style="bold")
    return Group(_table(report, most), *notes, head, example_text(report.example))


def _public(report: Report) -> tuple[str, ...]:
    if not report.public_rows:
        return ()
    leaked = f"{report.leaked_public_rows:,} of them are evaluation rows too"
    return (f"{report.public_rows:,} public rows are the server's, and no client's; {leaked}",)


def example_text(example: Example) -> "Text":
    """Return a decoded row, the masked part dimmed."""
    from rich.text import Text

    return Text.assemble(*((text, "green" if learned else "dim") for text, learned in example))


def _table(report: Report, most: int) -> "Table":
    from rich.markup import escape

    from sheepfold.terminal import table

    shown = report.clients if len(report.clients) <= most else report.worst(most)
    hidden = len(report.clients) - len(shown)
    title = f"the {len(shown)} clients with the most findings, of {len(report.clients):,}"
    headings = ("train", "eval", "test", "tokens", "learned", "cut", "no target", "repeated", "shared", "leaked")
    view = table(title if hidden else None, "client", *headings)
    for client in shown:
        view.add_row(escape(client.client), *_cells(client))
    view.add_section()
    view.add_row("all", *_cells(report.total()), style="bold")
    return view


def _cells(client: ClientReport) -> Iterator[str]:
    for name in _NUMBERS:
        value = getattr(client, name)
        finding = name in ("rows_without_target", "repeated_rows", "shared_rows", "leaked_rows") and value
        yield f"[yellow]{value:,}[/]" if finding else f"{value:,}"


def _all_rows(data: FederatedData, client: str) -> np.ndarray:
    split = data.clients[client]
    return np.concatenate([split.train, split.eval, split.test])


def _keys(records: Sequence[Record]) -> np.ndarray:
    """Return a number for each record's words, equal where they are; blanks around them do not count."""
    seen: dict[tuple[object, ...], int] = {}
    words = ((r.instruction.strip(), r.input.strip(), r.output.strip(), r.messages) for r in records)
    return np.array([seen.setdefault(key, len(seen)) for key in words], dtype=np.int64)


def _example(data: FederatedData, tokenizer: Any) -> Example:
    """Return the first client's first training row, decoded run by run."""
    row = int(next(iter(data.clients.values())).train[0])
    ids, labels = data.tokens.row(row)
    if data.labels:
        return (str(tokenizer.decode(ids[:-1])), False), (f" {data.labels[int(ids[-1])]}", True)
    learned = (labels >= 0).numpy()
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(learned)]
    return tuple((str(tokenizer.decode(ids[start:end])), bool(learned[start])) for start, end in pairwise(borders))
