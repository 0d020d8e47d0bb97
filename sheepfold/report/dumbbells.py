"""The chart of joining: a row a client, a mark for each score."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from sheepfold.report.figures import BLUE, GREEN, GREY, PURPLE, VERMILLION, blank, safe, shortened
from sheepfold.report.lines import is_share, title

WHO = {
    "base": (GREY, "circle-open", "base"),
    "local": (VERMILLION, "square", "alone"),
    "federated": (BLUE, "circle", "federated"),
    "personal": (GREEN, "diamond", "personal"),
    "centralised": (PURPLE, "triangle-up-open", "all rows in one place"),
}
"""Who is scored: colour, marker, name on the page."""


TIED = 0.012
"""Marks closer than this share of a chart's width, half a mark on a wide page, would cover each other."""


def dumbbells(
    clients: Sequence[str], scores: Mapping[str, Mapping[str, float]], measure: str, it: str, target: str = "token"
) -> go.Figure:
    """Return a row a client: a mark for each score, and a bar from alone to `it`, which a client that joined has.

    target: what a loss is a mean over.
    """
    axis = f"nats per {target}" if measure == "loss" else title(measure)
    made = blank(axis, "", height=110 + 28 * max(3, len(clients)), hovermode="closest")
    values = [value for c in clients for value in scores.get(c, {}).values()]
    most, least = max(values, default=1.0), min(0.0, min(values, default=0.0))
    held = {client: scores.get(client, {}) for client in clients}
    at = {c: {w: i + off for w, off in apart(held[c], TIED * most).items()} for i, c in enumerate(clients)}
    for client, own in held.items():
        if {"local", it} <= own.keys():
            made.add_scatter(
                x=[own["local"], own[it]], y=[at[client]["local"], at[client][it]], mode="lines", showlegend=False,
                hoverinfo="skip", line={"color": GREY, "width": 2},
            )  # fmt: skip
    for who, (colour, symbol, label) in WHO.items():
        having = [client for client in clients if who in held[client]]
        if having:
            made.add_scatter(
                x=[held[c][who] for c in having], y=[at[c][who] for c in having], name=label, mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2 if "open" in symbol else 0}},
                text=[safe(client) for client in having],
                hovertemplate="%{text}: %{x:.1%}" if is_share(measure) else "%{text}: %{x:.3f}",
            )  # fmt: skip
    made.update_yaxes(range=[len(clients) - 0.3, -0.7], ticklabelstandoff=6, tickvals=list(range(len(clients))))
    made.update_yaxes(ticktext=[safe(shortened(client)) for client in clients])
    made.update_xaxes(showgrid=True, range=[least - 0.03 * (most - least), most + 0.04 * (most - least)])
    if is_share(measure):
        made.update_xaxes(tickformat=".0%")
    return made


def apart(scores: Mapping[str, float], tied: float) -> dict[str, float]:
    """Return who -> how far from its row's middle a mark lies, in rows: those within `tied` of each other spread out.

    A mark that another one covers would say that a score is missing.
    """
    order = [w for w in sorted(WHO, key=lambda w: scores.get(w, 0.0)) if w in scores]
    groups: list[list[str]] = []
    for who in order:
        if groups and scores[who] - scores[groups[-1][-1]] <= tied:
            groups[-1].append(who)
        else:
            groups.append([who])
    found: dict[str, float] = {}
    for group in groups:
        step = min(0.3, 0.84 / max(1, len(group) - 1))
        ranked = [who for who in WHO if who in group]
        found |= {who: step * (i - (len(ranked) - 1) / 2) for i, who in enumerate(ranked)}
    return found
