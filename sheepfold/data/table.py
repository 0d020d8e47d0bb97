"""Who holds how much of what: clients x categories as numbers, a terminal table, and a heat map to print.

The picture follows the figure of Shepherd's README: one row a client, one column a category, darker for more.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from sheepfold.data.rows import FederatedData, PartitionedData

if TYPE_CHECKING:
    from rich.table import Table

NONE = "(none)"
"""The category of rows that have none."""

SCALE = ((232, 243, 229), (116, 184, 148), (9, 79, 65))
"""Pale, middle and deep end of the colour scale: one hue, light to dark, so that it also prints in grey."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of each client in each category."""

    clients: tuple[str, ...]
    categories: tuple[str, ...]
    rows: np.ndarray
    """(clients, categories) int64"""

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return {client: {category: rows}}, without zeros."""
        table = {}
        for client, row in zip(self.clients, self.rows, strict=True):
            table[client] = {name: int(count) for name, count in zip(self.categories, row, strict=True) if count}
        return table

    def limited(self, most_clients: int, most_categories: int) -> "tuple[Counts, np.ndarray]":
        """Return the first clients with their largest categories, the rest added up, and the totals of all clients."""
        rows, names = self.rows, self.categories
        if len(names) > most_categories:
            order = np.argsort(-rows[:most_clients].sum(axis=0), kind="stable")
            kept, rest = np.sort(order[: most_categories - 1]), order[most_categories - 1 :]
            rows = np.column_stack([rows[:, kept], rows[:, rest].sum(axis=1)])
            names = (*(names[i] for i in kept), f"({len(rest):,} others)")
        return Counts(self.clients[:most_clients], names, rows[:most_clients]), rows.sum(axis=0)


def counts(data: PartitionedData | FederatedData) -> Counts:
    """Return how many rows each client has of each category, evaluation rows included."""
    held: Mapping[str, Counter[str]] = {
        client: Counter(data.records[row].category or NONE for row in np.concatenate([s.train, s.eval, s.test]))
        for client, s in data.clients.items()
    }
    categories = sorted(set().union(*held.values()))
    rows = np.array([[held[client][name] for name in categories] for client in held], dtype=np.int64)
    return Counts(tuple(held), tuple(categories), rows)


def terminal(table: Counts, most_clients: int = 40, most_categories: int = 8) -> "Table":
    """Return a rich table; beyond the limits, clients are left out and categories added up, and the table says so."""
    from rich.markup import escape

    from sheepfold.terminal import table as empty_table

    shown, total = table.limited(most_clients, most_categories)
    view = empty_table(_summary(table), "client", *(escape(c.replace("_", " ")) for c in shown.categories), "all")
    for client, row in zip(shown.clients, shown.rows, strict=True):
        view.add_row(escape(client), *(f"{count:,}" if count else "·" for count in row), f"[bold]{row.sum():,}")
    if hidden := len(table.clients) - len(shown.clients):
        view.add_row(f"… {hidden:,} more", *[""] * (len(shown.categories) + 1))
    view.add_section()
    view.add_row("all", *(f"{count:,}" for count in total), f"[bold]{total.sum():,}")
    return view


def heatmap_html(
    table: Counts, title: str = "Who holds what", most_clients: int = 250, most_categories: int = 40
) -> str:
    """Return one self-contained page with a row a client and a column a category; no script, ready to print."""
    shown, total = table.limited(most_clients, most_categories)
    top = int(shown.rows.max(initial=0))
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in (*shown.categories, "all"))
    body = "\n".join(_row(client, row, top) for client, row in zip(shown.clients, shown.rows, strict=True))
    foot = "".join(f"<td>{count:,}</td>" for count in (*total, total.sum()))
    hidden = len(table.clients) - len(shown.clients)
    more = f"The first {len(shown.clients):,} clients; {hidden:,} more are counted in the totals." if hidden else ""
    slots = {
        "title": escape(title),
        "summary": _summary(table),
        "legend": _legend(top),
        "head": head,
        "body": body,
        "foot": foot,
        "more": more,
        "dense": " dense" if len(shown.clients) > 40 else "",
    }
    return re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], _PAGE)  # one pass: names may hold braces


def _summary(table: Counts) -> str:
    clients, categories = len(table.clients), len(table.categories)
    return f"{table.rows.sum():,} rows · {clients:,} clients · {categories:,} categories"


def _row(client: str, row: np.ndarray, top: int) -> str:
    cells = "".join(_cell(int(count), top) for count in row)
    return f'<tr><th scope="row">{escape(client)}</th>{cells}<td class="sum">{row.sum():,}</td></tr>'


def _cell(count: int, top: int) -> str:
    if not count:
        return '<td class="zero">·</td>'
    back, ink = colours(count / top)
    return f'<td style="background:{back};color:{ink}">{count:,}</td>'


def colours(share: float) -> tuple[str, str]:
    """Return the cell's and the number's colour for a share of the largest count, at least 4.5:1 apart (WCAG AA)."""
    # The square root spreads the many small counts; equal steps of it look about equal.
    depth = math.sqrt(min(max(share, 0.0), 1.0))
    start, end = (SCALE[0], SCALE[1]) if depth < 0.5 else (SCALE[1], SCALE[2])
    step = 2 * depth if depth < 0.5 else 2 * depth - 1
    back = tuple(round(low + (high - low) * step) for low, high in zip(start, end, strict=True))
    ink = max(((255, 255, 255), (0, 0, 0)), key=lambda colour: contrast(back, colour))
    return _css(back), _css(ink)


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the contrast ratio of two sRGB colours, 1 to 21. Source: WCAG 2.1, 1.4.3."""

    def luminance(colour: Sequence[int]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _css(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _legend(top: int) -> str:
    steps = {1, *(round(top * share) for share in (0.1, 0.25, 0.5, 1.0))} - {0}
    return "".join(_css_step(count, top) for count in sorted(steps)) if top else ""


def _css_step(count: int, top: int) -> str:
    back, ink = colours(count / max(top, 1))
    return f'<span style="background:{back};color:{ink}">{count:,}</span>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body { margin: 2.5rem auto; padding: 0 1.5rem; width: fit-content; max-width: 100%; color: #11221e; background: #fff;
  font: 15px/1.4 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; box-sizing: border-box }
h1 { margin: 0; font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em }
p { margin: .3rem 0 1rem; color: #4b5b56 }
.legend { display: flex; align-items: center; gap: 2px; margin: 0 0 1.2rem; font-size: .8rem; color: #4b5b56 }
.legend span { padding: .15rem .6rem; font-variant-numeric: tabular-nums }
.legend b { font-weight: 500; margin-right: .6rem }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums }
thead th { height: 7.5rem; vertical-align: bottom; padding: 0; font-weight: 500; background: #fff;
  position: sticky; top: 0 }
thead th span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg); padding: .4rem 0;
  max-height: 12rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
thead th:first-child { text-align: left; padding: 0 0 .4rem }
tbody th, tfoot th { text-align: left; font-weight: 500; padding: 0 .9rem 0 0; white-space: nowrap }
td { min-width: 3.4rem; height: 2.1rem; padding: 0 .5rem; text-align: center; border-radius: 3px;
  box-sizing: border-box }
td.zero { color: #707f7a; background: #fafbf9 }
td.sum, tfoot td { font-weight: 650 } td.sum { text-align: right }
tfoot td, tfoot th { padding-top: .4rem }
.dense { font-size: 12px } .dense td { height: 1.25rem; min-width: 2.6rem; padding: 0 .35rem; border-radius: 2px }
.dense table { border-spacing: 1px }
@media print {
  body { margin: 0; padding: 0; font-size: 10px } thead th { position: static } tr { break-inside: avoid }
  td, .legend span { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="legend"><b>rows in a cell</b>{legend}</div>
<div class="map{dense}">
<table>
<thead><tr><th scope="col">client</th>{head}</tr></thead>
<tbody>
{body}
</tbody>
<tfoot><tr><th scope="row">all</th>{foot}</tr></tfoot>
</table>
</div>
<p>{more}</p>
</body>
</html>
"""
