"""Who holds what: clients by categories as a table whose cells are darker for more, so that it is its own data."""

import numpy as np

from sheepfold.data.table import Counts, colours
from sheepfold.report import html, words
from sheepfold.report.facts import RunFacts
from sheepfold.report.html import paragraph, section

MOST_CLIENTS, MOST_CATEGORIES = 40, 24
"""Clients and categories that the table shows; it says so where there are more."""


def holding(run: RunFacts) -> str:
    """Return who holds what: clients by categories, training rows."""
    name, heading = "data", "Who holds what"
    if run.table is None:
        says = "This run did not write down its clients' categories: it is older, or has not begun."
        if run.clients:
            rows = words.plural(sum(sizes["train"] for sizes in run.clients.values()), "training row")
            says += f" It has {rows} at {words.plural(len(run.clients), 'client')}."
        return section(name, heading, paragraph(says))
    counts, total = run.table, run.table.rows.sum(axis=0)
    biggest = np.argsort(-counts.rows.sum(axis=1), kind="stable")[:MOST_CLIENTS]
    order = np.sort(biggest) if len(counts.clients) <= MOST_CLIENTS else biggest
    shown = Counts(tuple(counts.clients[i] for i in order), counts.categories, counts.rows[order])
    shown, _ = shown.limited(MOST_CLIENTS, MOST_CATEGORIES)
    rows, clients = words.plural(int(total.sum()), "training row"), words.plural(len(counts.clients), "client")
    says = f"{rows} of {clients} in {len(counts.categories):,} categories."
    left = len(counts.clients) - len(shown.clients)
    if left:
        says += f" The {len(shown.clients)} clients with the most rows are shown; the other {left:,} are one line."
    return section(name, heading, paragraph(says), _heat_map(counts, shown))


def _heat_map(counts: Counts, shown: Counts) -> str:
    """Return the table of rows, darker for more; clients and categories that are not shown are added up."""
    named = {name: i for i, name in enumerate(counts.categories)}
    inside = [named[name] for name in shown.categories if name in named]
    outside = np.setdiff1d(np.arange(len(named)), inside)
    whole = counts.rows[:, inside].sum(axis=0)
    if len(inside) < len(shown.categories):  # the last column adds up the categories that are not shown
        whole = np.append(whole, counts.rows[:, outside].sum())
    top = int(shown.rows.max(initial=1)) or 1

    def cells(row: np.ndarray, *, coloured: bool) -> str:
        made = []
        for count in map(int, row):
            back, ink = colours(count / top) if coloured and count else ("", "")
            style = f' style="background:{back};color:{ink}"' if back else ' class="zero"' * (not count)
            made.append(f"<td{style}>{f'{count:,}' if count else '·'}</td>")
        return "".join(made) + f'<td class="sum">{int(row.sum()):,}</td>'

    def line(name: str, row: np.ndarray, *, coloured: bool) -> str:
        return f'<tr><th scope="row">{html.text(name)}</th>{cells(row, coloured=coloured)}</tr>'

    head = "".join(
        f'<th scope="col"><span>{html.text(n.replace("_", " "))}</span></th>' for n in (*shown.categories, "all")
    )
    body = "".join(line(c, row, coloured=True) for c, row in zip(shown.clients, shown.rows, strict=True))
    left = len(counts.clients) - len(shown.clients)
    rest = line(f"{left:,} others", whole - shown.rows.sum(axis=0), coloured=False) if left else ""
    caption = "Training rows of each client in each category; darker is more"
    return html.box(
        caption,
        f'<table><caption><span>{caption}</span></caption><thead><tr><th scope="col" class="words">client</th>'
        f"{head}</tr></thead>"
        f"<tbody>{body}</tbody><tfoot>{rest}{line('all', whole, coloured=False)}</tfoot></table>",
        "heat",
    )
