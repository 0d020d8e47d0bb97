"""The charts, as plotly figures. Every series has its own colour, dash and marker, so none is told by colour alone.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), those of at least 3:1 on both the light and the dark page.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any

import plotly.graph_objects as go

from sheepfold.report.compare import metric_curve, teacher_curve
from sheepfold.report.facts import RunFacts
from sheepfold.report.intervals import Interval
from sheepfold.report.lines import is_share, title

BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a8783"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, GREY, "#4699cb", "#b07d2b")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star")
PATTERNS = ("", "/", "x", ".", "-", "\\", "|")


def safe(text: str) -> str:
    """Return a name that plotly, which reads a little HTML, shows as it is."""
    return escape(text, quote=False)


def shortened(text: str, most: int = 22) -> str:
    """Return a name that fits beside a chart on a phone."""
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def as_json(figure: go.Figure) -> str:
    """Return a figure as JSON that may stand inside a script element."""
    return json.dumps(figure.to_plotly_json(), separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def blank(x: str, y: str, height: int = 380, **layout: Any) -> go.Figure:
    """Return an empty chart with its axes named."""
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
    made = blank("round", y, height)
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
    made = _over_rounds(rounds, f"loss, nats per {run.target}")
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
    for i, (key, name) in enumerate(names.items()):
        style = 0 if key == run.key else (5, 2, 3)[i]
        points = {r.round: r.loss[key] for r in run.evaluated if key in r.loss}
        if points and not (key == "never_sampled" and list(points) == [0]):  # before round 1 nobody was sampled
            made.add_trace(_line(name, points, style, ".3f"))
    made.add_trace(_line("training", {r.round: v for r in run.trained if (v := r.train_loss) is not None}, 1, ".3f"))
    if taught := teacher_curve(run, "loss"):
        made.add_trace(_line("the server's teacher", taught, 4, ".3f"))
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
    points, taught = metric_curve(run, metric), teacher_curve(run, metric)
    digits = ".1%" if is_share(metric) else ".3f"
    made = _over_rounds(list(points), title(metric), 320)
    made.add_trace(_line(title(metric), points, 0, digits, showlegend=bool(taught)))
    if taught:
        made.add_trace(_line("the server's teacher", taught, 4, digits))
    return _percent(made, metric)


def _percent(made: go.Figure, measure: str) -> go.Figure:
    return made.update_yaxes(tickformat=".0%") if is_share(measure) else made


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


def curves(
    groups: Mapping[str, Mapping[int, Interval]],
    y: str,
    measure: str = "loss",
    taught: Mapping[str, Mapping[int, Interval]] = MappingProxyType({}),
) -> go.Figure:
    """Return a line a group over rounds; a band where its runs, under several seeds, give an interval.

    taught: the lines of the groups' teachers, dashed, thinner and with open marks, in the colour of their group.
    """
    rounds = [r for points in groups.values() for r in points]
    made = _over_rounds(rounds, y, 440)
    digits = ".1%" if is_share(measure) else ".3f"
    for style, (name, points) in enumerate(groups.items()):
        _band(made, points, COLOURS[style % len(COLOURS)])
        made.add_trace(_line(name, _means(points), style, digits))
        if theirs := taught.get(name):
            line = _line(f"{name}: teacher", _means(theirs), style, digits)
            symbol = f"{MARKERS[style % len(MARKERS)]}-open"
            made.add_trace(line.update(line={"dash": "4px,3px", "width": 1.4}, marker={"symbol": symbol, "size": 6}))
    return _percent(made, measure)


def _means(points: Mapping[int, Interval]) -> dict[int, float]:
    return {r: i.mean for r, i in points.items()}


def _band(made: go.Figure, points: Mapping[int, Interval], colour: str) -> None:
    """Draw the intervals, where there are any."""
    known = {r: i for r, i in points.items() if i.reach is not None}
    if not known:
        return
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "x": list(known)}
    made.add_scatter(y=[i.mean + (i.reach or 0) for i in known.values()], **edge)
    made.add_scatter(
        y=[i.mean - (i.reach or 0) for i in known.values()], fill="tonexty",
        fillcolor=f"rgba({red},{green},{blue},0.16)", **edge,
    )  # fmt: skip
