"""Pieces of HTML: escaped text, tables that scroll inside their box, charts followed by their data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from sheepfold.report.figures import as_json

Cell = str | int | float | None
LINKS = {
    "rounds": "Rounds",
    "curves": "Rounds",
    "closing": "Side by side",
    "settings": "What differs",
    "data": "Data",
    "ranks": "Ranks",
    "joining": "Joining",
    "cost": "Cost",
    "faults": "Faults",
    "benchmarks": "Benchmarks",
    "experiment": "Experiment",
    "experiments": "Experiments",
}
"""Section -> its link at the top of the page."""


@dataclass(frozen=True, slots=True)
class Raw:
    """HTML that is already escaped."""

    text: str


def text(value: "Cell | Raw") -> str:
    """Return a cell as HTML; numbers with separators, a dash for None."""
    if isinstance(value, Raw):
        return value.text
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(f"{value:.4g}" if isinstance(value, float) else value)


def paragraph(words: str, kind: str = "") -> str:
    """Return a paragraph of escaped words."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{escape(words)}</p>"


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence["Cell | Raw"]],
    *,
    foot: Iterable[Sequence["Cell | Raw"]] = (),
    words: Sequence[int] = (),
) -> str:
    """Return a table whose first column names the rows; words: further columns that hold text, not figures."""
    columns = [' class="words"' if i == 0 or i in words else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, columns, strict=True))

    def line(row: Sequence["Cell | Raw"]) -> str:
        first, *rest = row
        cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, columns[1:], strict=True))
        return f'<tr><th scope="row">{text(first)}</th>{cells}</tr>'

    body, last = "".join(map(line, rows)), "".join(map(line, foot))
    below = f"<tfoot>{last}</tfoot>" if last else ""
    return box(
        caption,
        f"<table><caption><span>{escape(caption)}</span></caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>{below}</table>",
    )


def box(label: str, inside: str, kind: str = "") -> str:
    """Return a region of its own that scrolls, by keyboard too, where its content is wider than the page."""
    return f'<div class="scroll {kind}" role="region" aria-label="{escape(label)}" tabindex="0">{inside}</div>'


def chart(name: str, figure: go.Figure, says: str, data: str) -> str:
    """Return a chart with its description and, closed, its data; name: letters and dashes, the only one on the page."""
    return (
        f'<figure><div class="chart" role="img" aria-label="{escape(says)}" data-figure="figure-{name}" '
        f'style="height:{int(figure.layout.height)}px"></div>'
        f'<script type="application/json" id="figure-{name}">{as_json(figure)}</script>'
        f"<figcaption>{escape(says)}</figcaption>"
        f"{details(f'data-{name}', 'The figures behind this chart', data)}</figure>"
    )


def details(name: str, summary: str, inside: str) -> str:
    """Return something that opens on request."""
    return f'<details id="{name}"><summary>{escape(summary)}</summary>{inside}</details>'


def section(name: str, heading: str, *inside: str) -> str:
    """Return a section with its heading."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(heading)}</h2>'
        f"{''.join(inside)}</section>"
    )


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures: (name, figure, what it is)."""
    made = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in figures
    )
    return f'<dl class="tiles">{"".join(made)}</dl>'


def framed(head: str, parts: Sequence[str]) -> str:
    """Return head, links and sections."""
    made = "".join(parts)
    links = "".join(f'<a href="#{key}">{label}</a>' for key, label in LINKS.items() if f'<section id="{key}"' in made)
    return f'<header>{head}<nav aria-label="Sections">{links}</nav></header>{made}'
