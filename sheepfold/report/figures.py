"""The charts, as plotly figures. Every series has its own colour, dash and marker, so none is told by colour alone.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), those of at least 3:1 on both the light and the dark page.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from sheepfold.report.facts import RunFacts
from sheepfold.report.intervals import Interval

BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a8783"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, GREY, "#4699cb")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star")
PATTERNS = ("", "/", "x", ".", "-", "\\")
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


def safe(text: str) -> str:
    """Return a name that plotly, which reads a little HTML, shows as it is."""
    return escape(text, quote=False)


def shortened(text: str, most: int = 22) -> str:
    """Return a name that fits beside a chart on a phone."""
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def as_json(figure: go.Figure) -> str:
    """Return a figure as JSON that may stand inside a script element."""
    return json.dumps(figure.to_plotly_json(), separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _figure(x: str, y: str, height: int = 380, **layout: Any) -> go.Figure:
    axis = {"automargin": True, "zeroline": False, "showline": True, "ticks": "outside", "fixedrange": True}
    made = go.Figure()
    made.update_layout(
        template="none",
        height=height,
        autosize=True,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        font={"family": "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left", "traceorder": "normal"},
        hovermode="x unified",
        dragmode=False,
        xaxis={**axis, "title": {"text": x, "standoff": 8}, "showgrid": False},
        yaxis={**axis, "title": {"text": y, "standoff": 8}, "showgrid": True, "showline": False, "ticks": ""},
    )
    return made.update_layout(**layout)


def _over_rounds(rounds: Sequence[int], y: str, height: int = 400) -> go.Figure:
    """Return an empty chart over rounds, whose ticks are whole."""
    last = max(rounds, default=1)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if last / s <= 12)
    made = _figure("round", y, height)
    made.update_xaxes(tick0=0, dtick=step, range=[-0.03 * last - 0.05, 1.03 * last + 0.05])
    return made


def _line(name: str, points: Mapping[int, float], style: int, digits: str, **more: Any) -> go.Scatter:
    colour = COLOURS[style % len(COLOURS)]
    return go.Scatter(
        x=list(points),
        y=list(points.values()),
        name=safe(name),
        mode="lines+markers" if len(points) <= 40 else "lines",
        line={"color": colour, "dash": DASHES[style % len(DASHES)], "width": 2.2},
        marker={"color": colour, "symbol": MARKERS[style % len(MARKERS)], "size": 7},
        hovertemplate="%{y:" + digits + "}",
        **more,
    )


def loss(run: RunFacts) -> go.Figure:
    """Return held-out and training loss per round, with the spread over clients, the best round and rises."""
    rounds = [r.round for r in run.rounds]
    made = _over_rounds(rounds, "loss, nats per token")
    spread = [r for r in run.evaluated if {"best_decile", "worst_decile"} <= r.loss.keys()]
    at = [r.round for r in spread]
    if spread:
        edge = {"mode": "lines", "line": {"width": 0.8, "color": BLUE, "dash": "dot"}, "hovertemplate": "%{y:.3f}"}
        made.add_scatter(x=at, y=[r.loss["worst_decile"] for r in spread], name="worst tenth", showlegend=False, **edge)
        made.add_scatter(
            x=at, y=[r.loss["best_decile"] for r in spread], name="best to worst tenth of clients", fill="tonexty",
            fillcolor="rgba(0,114,178,0.15)", **edge,
        )  # fmt: skip
    names = {"weighted": "held-out", "global": "held-out, global test set", "never_sampled": "never-sampled clients"}
    for style, (key, name) in zip((0, 2, 3), names.items(), strict=True):
        points = {r.round: r.loss[key] for r in run.evaluated if key in r.loss}
        if points and not (key == "never_sampled" and list(points) == [0]):  # before round 1 nobody was sampled
            made.add_trace(_line(name, points, style, ".3f"))
    made.add_trace(_line("training", {r.round: v for r in run.trained if (v := r.train_loss) is not None}, 1, ".3f"))
    _mark(made, run)
    return made


def _mark(made: go.Figure, run: RunFacts) -> None:
    """Mark the best round, and those whose loss rose."""
    key, best = run.key, run.best
    rose = [r for r in run.evaluated if r.rose and key in r.loss]
    if rose:
        made.add_scatter(
            x=[r.round for r in rose], y=[r.loss[key] for r in rose], name="rose", mode="markers", hoverinfo="skip",
            marker={"symbol": "triangle-up-open", "size": 15, "color": VERMILLION, "line": {"width": 2}},
        )  # fmt: skip
    if best is not None:
        made.add_scatter(
            x=[best.round], y=[best.loss[key]], name="lowest held-out", mode="markers", hoverinfo="skip",
            marker={"symbol": "star", "size": 15, "color": BLUE, "line": {"width": 1, "color": "#ffffff"}},
        )  # fmt: skip


def measures(run: RunFacts, metric: str) -> go.Figure:
    """Return a further measure per round."""
    points = {r.round: r.metrics[metric] for r in run.rounds if metric in r.metrics}
    made = _over_rounds(list(points), metric.replace("_", " "), 320)
    made.add_trace(_line(metric.replace("_", " "), points, 0, ".3f", showlegend=False))
    return made


def dumbbells(clients: Sequence[str], scores: Mapping[str, Mapping[str, float]], measure: str, it: str) -> go.Figure:
    """Return a row a client: a mark for each score, and a bar from alone to `it`, which a client that joined has."""
    named = measure.replace("_", " ")
    made = _figure(
        "nats per token" if measure == "loss" else named,
        "",
        height=110 + 28 * max(3, len(clients)),
        hovermode="closest",
    )
    most = max((value for c in clients for value in scores.get(c, {}).values()), default=1.0)
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
                hovertemplate="%{text}: %{x:.3f}" if measure == "loss" else "%{text}: %{x:.1%}",
            )  # fmt: skip
    made.update_yaxes(range=[len(clients) - 0.3, -0.7], ticklabelstandoff=6, tickvals=list(range(len(clients))))
    made.update_yaxes(ticktext=[safe(shortened(client)) for client in clients])
    made.update_xaxes(showgrid=True, range=[-0.03 * most, 1.04 * most])
    if measure != "loss":
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


def stacked(rounds: Sequence[int], parts: Mapping[str, Sequence[float]], y: str) -> go.Figure:
    """Return a bar a round, stacked from its parts."""
    made = _over_rounds(rounds, y, 340)
    for i, (name, values) in enumerate(parts.items()):
        made.add_bar(
            x=list(rounds), y=list(values), name=safe(name), hovertemplate="%{y:.3s}",
            marker={
                "color": COLOURS[i % len(COLOURS)],
                "pattern": {"shape": PATTERNS[i % len(PATTERNS)], "size": 6, "solidity": 0.3, "fillmode": "overlay",
                            "fgcolor": "rgba(255,255,255,0.75)"},
            },
        )  # fmt: skip
    made.update_layout(barmode="stack", bargap=0.25)
    made.update_xaxes(range=[min(rounds, default=0) - 0.6, max(rounds, default=1) + 0.6])
    return made


def curves(groups: Mapping[str, Mapping[int, Interval]], y: str, digits: str = ".3f") -> go.Figure:
    """Return a line a group over rounds; a band where its runs, under several seeds, give an interval."""
    rounds = [r for points in groups.values() for r in points]
    made = _over_rounds(rounds, y, 440)
    for style, (name, points) in enumerate(groups.items()):
        known = {r: i for r, i in points.items() if i.reach is not None}
        if known:
            colour = COLOURS[style % len(COLOURS)]
            red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
            edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "x": list(known)}
            made.add_scatter(y=[i.mean + (i.reach or 0) for i in known.values()], **edge)
            made.add_scatter(
                y=[i.mean - (i.reach or 0) for i in known.values()], fill="tonexty",
                fillcolor=f"rgba({red},{green},{blue},0.16)", **edge,
            )  # fmt: skip
        made.add_trace(_line(name, {r: i.mean for r, i in points.items()}, style, digits))
    return made
